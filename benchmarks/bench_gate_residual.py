"""gate_residual: the gated residual of adaLN-Zero and Mochi's sandwich, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.gate_residual import gate_residual
from sora_kernels.rows import RowMap

from .registry import DTYPES, Case, Context, Inputs, op_cases

BEYOND_CACHE = (16384, 1152)  # DiT-XL's width, as many tokens as a short clip of 480p
# (tokens, width): DiT-S, DiT-XL, Wan 1.3B, FLUX/Hunyuan-like, Wan 14B
SHAPES = ((4096, 384), (4096, 1152), BEYOND_CACHE, (4096, 1536), (4096, 3072), (4096, 5120))
SAMPLES = 8
# A GPU is filled by a video of 480p, 64 MB and more a tensor.
CUDA = tuple((32768, d, SAMPLES) for d in (1152, 1536, 3072, 5120))


def ours(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return gate_residual(x, y, gate, rows=rows)


def per_sample(x: Tensor, rows: RowMap) -> Tensor:
    return x.view(rows.num_rows, rows.tokens_per_row, -1)


def plain(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    """What DiT code says: ``x + gate * y``, broadcast over a sample's tokens."""
    return (per_sample(x, rows) + gate.unsqueeze(1) * per_sample(y, rows)).view_as(x)


def ours_sandwich(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    return gate_residual(x, y, gate, rows=rows, tanh=True, norm="rms")


def plain_sandwich(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
    """Mochi: ``x + tanh(gate) * rms_norm(y)``."""
    return plain(x, F.rms_norm(y, y.shape[-1:], eps=1e-6), torch.tanh(gate), rows)


def inputs(tokens: int, width: int, rows: int, dtype: str, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    return {
        "x": randn(tokens, width),
        "y": randn(tokens, width),
        "gate": randn(rows, width),
        "rows": RowMap.uniform(rows, tokens // rows),
    }


def cases(context: Context) -> Iterable[Case]:
    points = [(n, d, SAMPLES, False) for n, d in SHAPES]
    points += [(*BEYOND_CACHE, 1, False), (*BEYOND_CACHE, BEYOND_CACHE[0], False)]
    points += [(*BEYOND_CACHE, SAMPLES, True)]
    quick = [(*BEYOND_CACHE, SAMPLES, False)]
    cuda = [*((*point, False) for point in CUDA), (*CUDA[2], True)]
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for tokens, width, rows, sandwich in context.pick(quick=quick, full=points, cuda=cuda):
            per_row = DTYPES[dtype].itemsize * width
            yield from op_cases(
                "gate_residual",
                f"{tokens}x{width} R={rows}" + (" tanh rms" if sandwich else ""),
                dtype,
                inputs=partial(inputs, tokens, width, rows, dtype),
                ours=ours_sandwich if sandwich else ours,
                plain=plain_sandwich if sandwich else plain,
                bytes={
                    "fwd": per_row * (3 * tokens + rows),  # x, y, gate -> out
                    # dout, y, gate -> dy, dgate; dx is dout itself
                    "bwd": per_row * (3 * tokens + 2 * rows),
                },
                flops={
                    "fwd": (6 if sandwich else 2) * tokens * width,
                    "bwd": (13 if sandwich else 3) * tokens * width,
                },
                grads=("x", "y", "gate"),
            )
