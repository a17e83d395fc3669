"""What the gate times of this project itself: our side of the quick cases of every op.

Prints `{"op/mode/case/dtype": milliseconds}`. Run by `python -m benchmarks gate` in two checkouts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import median

from .pinned import pin


def main(argv: Sequence[str]) -> int:
    import torch

    from sora_kernels.bench import measure, measure_cuda
    from sora_kernels.bench.schema import OURS

    from .registry import Context, load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    times = {}
    for case in load(["ops"], Context(device=device, quick=True), argv[0] if argv else None):
        torch.manual_seed(0)
        run = case.providers[OURS](case.inputs(torch.device(device)))
        timer = measure_cuda if device == "cuda" else measure
        times[case.name] = median(timer({"ours": run}, seconds=0.3)["ours"])
    print(json.dumps(times))
    return 0


if __name__ == "__main__":
    pin(sys.argv[1:], "benchmarks.gate_cases")
    sys.exit(main(sys.argv[1:]))
