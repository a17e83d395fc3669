"""The packing planner: clips of any length into token budgets, evenly over the ranks of a job.

Clips come in a keyed random order and are packed window by window, a window being a bounded number
of packs. Within a window, best-fit decreasing fills packs up to the token budget; packs of similar
cost form a step (one pack per rank, so that no rank waits for another), heavier packs go to the
ranks that have done less so far, and the steps are shuffled. The least filled packs of a window are
taken apart again and their clips go first in the next one. Everything is integer arithmetic and a
pure function of the lengths, the seed, the epoch and the number of ranks.

The inner loop is C++ (`csrc/host`) where that is built; NumPy and bisect give the same plan.
"""

from .bins import lower_bound
from .cost import Cost
from .epoch import Plan, plan
from .sampler import PackSampler
from .stream import PackStream, pack_stream

__all__ = ["Cost", "PackSampler", "PackStream", "Plan", "lower_bound", "pack_stream", "plan"]
