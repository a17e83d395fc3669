"""norm_silu: Wan's RMS and GroupNorm, at sizes of a video VAE's decoder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import norm_silu

from .registry import DTYPES, Case, Context, Inputs, op_cases

GROUPS = 32
# (norm, layout, channels, frames, height, width)
SHAPES = (
    ("rms", "last", 96, 4, 240, 208),
    ("rms", "last", 384, 2, 60, 104),
    ("rms", "first", 96, 4, 240, 208),
    ("group", "last", 128, 4, 120, 208),
    ("group", "first", 128, 4, 120, 208),
)
# The same stages at 720p.
CUDA = (
    ("rms", "last", 96, 4, 720, 640),
    ("rms", "last", 384, 2, 180, 320),
    ("group", "last", 128, 4, 360, 640),
    ("group", "first", 128, 4, 360, 640),
)


def inputs(
    norm: str, layout: str, channels: int, frames: int, height: int, width: int, dtype: str,
    device: torch.device,
) -> Inputs:  # fmt: skip
    x = torch.randn(1, channels, frames, height, width, device=device).to(DTYPES[dtype])
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = 1 + 0.1 * torch.randn(channels, device=device).to(DTYPES[dtype])
    return {"x": x, "weight": weight, "norm": norm}


def ours(x: Tensor, weight: Tensor, norm: str) -> Tensor:
    return norm_silu(x, weight, norm=norm, groups=GROUPS)


def plain(x: Tensor, weight: Tensor, norm: str) -> Tensor:
    """F.group_norm, or F.rms_norm over the last dimension (faster than Wan's F.normalize)."""
    if norm == "group":
        return F.silu(F.group_norm(x, GROUPS, weight, eps=1e-6))
    return F.silu(F.rms_norm(x.movedim(1, -1), weight.shape, weight, 1e-6)).movedim(-1, 1)


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for shape in context.pick(quick=SHAPES[:1], full=SHAPES, cuda=CUDA):
            norm, layout, channels, frames, height, width = shape
            count = channels * frames * height * width
            size = count * DTYPES[dtype].itemsize
            passes = 2 if norm == "group" else 1  # GroupNorm reads its inputs twice
            yield from op_cases(
                "norm_silu",
                f"{norm} {channels}x{frames}x{height}x{width} {layout}",
                dtype,
                inputs=partial(inputs, *shape, dtype),
                ours=ours,
                plain=plain,
                bytes={"fwd": (passes + 1) * size, "bwd": (2 * passes + 1) * size},
                flops={"fwd": 10 * count, "bwd": 20 * count},
                grads=("x", "weight"),
            )
