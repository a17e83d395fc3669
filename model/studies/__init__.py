"""Studies of training, one command each: `python -m model.studies packing|native|compute|events`.

`packing`: clips of many sizes in one pack, against the plain ways of batching them.
`native`: training at the clips' own sizes, against their square centre crops.
`compute`: what 1x, 4x and 16x of training compute buy.
`events`: where training is heading with two objects, occlusion, collision and bounces.

The first three train small models from nothing, with several seeds; the last one goes on from the
shipped checkpoint. Each run has one thread, is looked at at stated budgets, and resumes where it
was last looked at. A study writes one JSON file and one picture.
"""
