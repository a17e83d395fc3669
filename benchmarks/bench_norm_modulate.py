"""norm_modulate: widths of real models; modulated per batch, per sample and per token."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.norm_modulate import norm_modulate
from sora_kernels.rows import RowMap

from .registry import DTYPES, Case, Context, Inputs, ahead_of_time, op_cases

BEYOND_CACHE = (16384, 1152)  # DiT-XL's width, as many tokens as a short clip of 480p
# (tokens, width): DiT-S, DiT-XL, Wan 1.3B, FLUX/Hunyuan-like, Wan 14B
SHAPES = ((4096, 384), (4096, 1152), BEYOND_CACHE, (4096, 1536), (4096, 3072), (4096, 5120))
SAMPLES = 8
# A GPU is filled by a video of 480p, 64 MB and more a tensor; widths as above, and a row per token.
CUDA = tuple((32768, d, SAMPLES) for d in (1152, 1536, 3072, 5120)) + ((32768, 1536, 32768),)


def ours(x: Tensor, shift: Tensor, scale: Tensor, rows: RowMap) -> Tensor:
    y = norm_modulate(x, shift, scale, rows=rows)
    assert isinstance(y, Tensor)
    return y


def plain(x: Tensor, shift: Tensor, scale: Tensor, rows: RowMap) -> Tensor:
    """What DiT code says: ``norm(x) * (1 + scale) + shift``, broadcast over a sample's tokens."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    samples = normed.view(rows.num_rows, rows.tokens_per_row, -1)
    return (samples * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).view_as(x)


def inputs(tokens: int, width: int, rows: int, dtype: str, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    return {
        "x": randn(tokens, width),
        "shift": randn(rows, width),
        "scale": randn(rows, width),
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
                "norm_modulate",
                f"{tokens}x{width} R={rows}",
                dtype,
                inputs=partial(inputs, tokens, width, rows, dtype),
                ours=ours,
                plain=plain,
                peers=ahead_of_time("norm_modulate", ours, context),
                bytes={
                    "fwd": per_row * (2 * tokens + 2 * rows),  # x, shift, scale -> y
                    "bwd": per_row * (3 * tokens + 3 * rows),  # dy, x, scale -> dx, dshift, dscale
                },
                flops={"fwd": 9 * tokens * width, "bwd": 15 * tokens * width},
                grads=("x", "shift", "scale"),
            )
