"""Timing, ceilings, the JSON of results, their comparison and their plots.

Used by ``python -m benchmarks`` and usable on its own::

    from sora_kernels.bench import measure, paired_ratio
    samples = measure({"ours": f, "theirs": g}, seconds=2.0)
    print(paired_ratio(samples["theirs"], samples["ours"]))

``python -m sora_kernels.bench.gate`` compares two checkouts of any project.
"""

from .ceilings import Ceilings, measure_ceilings
from .compare import Change, compare
from .schema import SCHEMA, make_row, read_report, validate, write_report
from .timing import Interval, clock_driver, measure, measure_cuda, median_interval, paired_ratio

__all__ = [
    "SCHEMA",
    "Ceilings",
    "Change",
    "Interval",
    "clock_driver",
    "compare",
    "make_row",
    "measure",
    "measure_ceilings",
    "measure_cuda",
    "median_interval",
    "paired_ratio",
    "read_report",
    "validate",
    "write_report",
]
