"""`python -m benchmarks gate --base DIR --head DIR`: `sora_kernels.bench.gate` on our ops.

Without `--run`, both checkouts time the quick cases of every op (`benchmarks.gate_cases`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from sora_kernels.bench import gate

CASES = f"{shlex.quote(sys.executable)} -m benchmarks.gate_cases"


def main(argv: Sequence[str] | None = None) -> int:
    """0 fine, 1 slower, 2 bad input or a run that failed."""
    return gate.main(argv, CASES)


if __name__ == "__main__":
    sys.exit(main())
