"""Three studies of training, one command each: `python -m model.studies packing|native|compute`.

`packing`: clips of many sizes in one pack, against the plain ways of batching them.
`native`: training at the clips' own sizes, against their square centre crops.
`compute`: what 1x, 4x and 16x of training compute buy.

Each trains small models from nothing with several seeds, one thread each, looks at them at stated
budgets, and writes one JSON file and one picture. A run that is stopped resumes where it last was
looked at.
"""
