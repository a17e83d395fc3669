"""gate_residual: the gated add of adaLN-Zero, and the sandwich ``x + tanh(gate) * norm(y)``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.gate_residual import gate_residual
from sora_kernels.rows import RowMap

from .bench_norm_modulate import BEYOND_CACHE, SAMPLES, SHAPES
from .registry import DTYPES, Case, Context, Inputs, op_cases


def per_sample(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate * y`` with one row of ``gate`` per sample."""
    samples, width = gate.shape
    return (x.view(samples, -1, width) + gate.unsqueeze(1) * y.view(samples, -1, width)).view_as(x)


def ours(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return gate_residual(x, y, gate, rows=rows)


def plain(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return per_sample(x, gate, y)


def ours_sandwich(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return gate_residual(x, y, gate, rows=rows, tanh=True, norm="rms")


def plain_sandwich(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return per_sample(x, gate.tanh(), F.rms_norm(y, y.shape[-1:], None, 1e-6))


def inputs(tokens: int, width: int, dtype: str, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    return {
        "x": randn(tokens, width),
        "y": randn(tokens, width),
        "gate": randn(SAMPLES, width),
        "rows": RowMap.uniform(SAMPLES, tokens // SAMPLES),
    }


def cases(context: Context) -> Iterable[Case]:
    points = [(ours, plain, "", n, d) for n, d in SHAPES]
    points.append((ours_sandwich, plain_sandwich, " tanh rms", *BEYOND_CACHE))
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16")):
        for own, eager, note, tokens, width in context.pick(
            quick=[(ours, plain, "", *BEYOND_CACHE)], full=points
        ):
            per_row = DTYPES[dtype].itemsize * width
            yield from op_cases(
                "gate_residual",
                f"{tokens}x{width} R={SAMPLES}{note}",
                dtype,
                inputs=partial(inputs, tokens, width, dtype),
                ours=own,
                plain=eager,
                bytes={
                    "fwd": per_row * (3 * tokens + SAMPLES),  # x, y, gate -> r
                    # dr, y, gate -> dy, dgate; the gradient of x is dr itself
                    "bwd": per_row * (3 * tokens + 2 * SAMPLES),
                },
                flops={"fwd": 2 * tokens * width, "bwd": 3 * tokens * width},
                grads=("x", "y", "gate"),
            )
