"""The environment every provider is timed in. Imports no torch, so that it acts first.

glibc hands large blocks back to the kernel and faults their pages in again on the next call, at
about 3 us per page: one and the same function times 48 ms or 8 ms, and the ratio of two providers
follows how many temporaries each of them makes. OpenMP threads that spin steal from whatever runs
beside them. Both are settled when the process starts, for all providers alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

PINNED = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(512 << 20),
}
# The profiler that counts memory narrates on stderr below this level.
QUIET = {"KINETO_LOG_LEVEL": "6"}


def pin(argv: Sequence[str], module: str = "benchmarks") -> None:
    """Re-executes ``python -m module argv`` in that environment, unless already in it."""
    wanted = {**QUIET, **PINNED}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", module, *argv]
        os.execve(sys.executable, command, {**os.environ, **wanted})
