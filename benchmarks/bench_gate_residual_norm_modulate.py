"""gate_residual_norm_modulate against plain PyTorch: residual add, norm and modulation at once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from sora_kernels.rows import RowMap

from .bench_gate_residual import BEYOND_CACHE, CUDA, SAMPLES, SHAPES, per_sample
from .registry import DTYPES, Case, Context, Inputs, ahead_of_time, op_cases


def ours(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: RowMap
) -> tuple[Tensor, Tensor]:
    return gate_residual_norm_modulate(x, y, gate, shift, scale, rows=rows)


def plain(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: RowMap
) -> tuple[Tensor, Tensor]:
    """What DiT code says at the end of one branch and the start of the next."""
    residual = per_sample(x, rows) + gate.unsqueeze(1) * per_sample(y, rows)
    normed = F.layer_norm(residual, x.shape[-1:], eps=1e-6)
    out = normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return residual.view_as(x), out.view_as(x)


def inputs(tokens: int, width: int, rows: int, dtype: str, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    modulations = {name: randn(rows, width) for name in ("gate", "shift", "scale")}
    return {
        "x": randn(tokens, width),
        "y": randn(tokens, width),
        **modulations,
        "rows": RowMap.uniform(rows, tokens // rows),
    }


def cases(context: Context) -> Iterable[Case]:
    points = [(n, d, SAMPLES) for n, d in SHAPES]
    points += [(*BEYOND_CACHE, 1), (*BEYOND_CACHE, BEYOND_CACHE[0])]
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for tokens, width, rows in context.pick(
            quick=[(*BEYOND_CACHE, SAMPLES)], full=points, cuda=CUDA
        ):
            per_row = DTYPES[dtype].itemsize * width
            yield from op_cases(
                "gate_residual_norm_modulate",
                f"{tokens}x{width} R={rows}",
                dtype,
                inputs=partial(inputs, tokens, width, rows, dtype),
                ours=ours,
                plain=plain,
                peers=ahead_of_time("gate_residual_norm_modulate", ours, context),
                bytes={
                    # x, y, gate, shift, scale -> residual, normed
                    "fwd": per_row * (4 * tokens + 3 * rows),
                    # two upstream gradients, x, y, gate, scale -> dx, dy, dgate, dshift, dscale
                    "bwd": per_row * (6 * tokens + 5 * rows),
                },
                flops={"fwd": 11 * tokens * width, "bwd": 20 * tokens * width},
                grads=("x", "y", "gate", "shift", "scale"),
            )
