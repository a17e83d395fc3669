"""One small forward and backward of every op: `python -m benchmarks.smallest --device cuda`.

Small enough for a checker that slows a kernel down a hundred times (compute-sanitizer), and for a
smoke test of an installed wheel, for which this file is run by its path and imports `sora_kernels`
alone. Prints one line per op and fails if a result is not finite.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def calls(device: Any, dtype: Any) -> dict[str, Callable[[], Any]]:
    """Name -> call; every floating-point input asks for its gradient."""
    import torch

    import sora_kernels as sk

    def randn(*shape: int) -> Any:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    layout = sk.PackedLayout(
        [[sk.Text(5), sk.Grid(2, 4, 6)], [sk.Grid(1, 6, 4)]], device=device, order="tile"
    )
    n, width = layout.num_tokens, 96
    rows = layout.segment_rows
    x, y, gate, shift, scale = randn(n, width), randn(n, width), *(randn(2, width) for _ in "gsc")
    q, k, v = (randn(n, 2, 64) for _ in "qkv")
    rope = layout.rope((16, 24, 24))
    grid = sk.PackedLayout.from_grids([(2, 4, 6)], patch=(1, 2, 2), device=device)
    video, image = randn(4, 2, 4, 6), randn(1, 32, 2, 6, 8)
    return {
        "norm_modulate": lambda: sk.norm_modulate(x, shift, scale, rows=rows),
        "gate_residual": lambda: sk.gate_residual(x, y, gate, rows=rows),
        "gate_residual_norm_modulate": lambda: sk.gate_residual_norm_modulate(
            x, y, gate, shift, scale, rows=rows
        ),
        "qk_norm_rope": lambda: sk.qk_norm_rope(q, k, randn(64), randn(64), rope),
        "packed_attention": lambda: sk.packed_attention(q, k, v, layout),
        "windowed_attention": lambda: sk.packed_attention(q, k, v, layout, window=(1, 3, 3)),
        "patchify": lambda: sk.patchify([video], grid),
        "unpatchify": lambda: sk.unpatchify(randn(grid.num_tokens, 16), grid, 4),
        "bias_gelu": lambda: sk.bias_gelu(x, randn(width)),
        "norm_silu": lambda: sk.norm_silu(image, randn(32)),
        "causal_conv_pad": lambda: sk.causal_conv_pad(image, pad_t=2, pad_h=1, pad_w=1),
        "guided_step": lambda: sk.guided_step(image, image * 2, image * 3, guidance=2.0, dt=-0.1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smallest", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", metavar="OP")
    options = parser.parse_args(argv)
    if options.device == "cuda":  # freed memory stays allocated otherwise, and hides what is read
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    import torch

    from sora_kernels import backend, explain, use_backend

    for chosen, dtype in itertools.product((None, "native"), ("float32", "bfloat16")):
        torch.manual_seed(0)
        for name, call in calls(torch.device(options.device), getattr(torch, dtype)).items():
            if options.only and name not in options.only:
                continue
            # The kernels compiled ahead of time, which on a CPU are those of the first turn.
            if chosen and (options.device == "cpu" or backend.why_not(name, chosen, "cuda")):
                continue
            with use_backend(chosen):
                result = call()
            outputs = list(result) if isinstance(result, (tuple, list)) else [result]
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            if options.device == "cuda":
                torch.cuda.synchronize()
            label = " ".join(filter(None, (name, dtype, chosen)))
            if not all(bool(t.isfinite().all()) for t in outputs):
                print(f"{label}: a result is not finite", file=sys.stderr)
                return 1
            print(f"{label}: {', '.join(str(tuple(t.shape)) for t in outputs)}")
    print(explain())
    return 0


if __name__ == "__main__":
    sys.exit(main())
