"""guided_step: guidance and an Euler step of latents, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from sora_kernels import guided_step

from .registry import DTYPES, Case, Context, Inputs, op_cases

# Latents [B, C, T, H, W]: a batch of 256 x 256 images, 81 frames at 480p (Wan), 720p.
SHAPES = ((8, 16, 1, 32, 32), (1, 16, 21, 60, 104), (2, 16, 21, 90, 160))


def ours(x: Tensor, cond: Tensor, uncond: Tensor, dt: Tensor) -> Tensor:
    return guided_step(x, cond, uncond, dt=dt, guidance=6.0)


def plain(x: Tensor, cond: Tensor, uncond: Tensor, dt: Tensor) -> Tensor:
    """As pipelines write it: combine, then step in fp32."""
    v = uncond + 6.0 * (cond - uncond)
    return x + dt.view(-1, 1, 1, 1, 1) * v.float()


def inputs(shape: tuple[int, ...], dtype: str, device: torch.device) -> Inputs:
    cond, uncond = torch.randn(2, *shape, device=device).to(DTYPES[dtype])
    return {
        "x": torch.randn(shape, device=device),
        "cond": cond,
        "uncond": uncond,
        "dt": torch.full((shape[0],), -0.05, device=device),
    }


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for shape in context.pick(quick=SHAPES[2:], full=SHAPES, cuda=SHAPES[2:]):
            n = torch.Size(shape).numel()
            size = DTYPES[dtype].itemsize
            yield from op_cases(
                "guided_step",
                "x".join(map(str, shape)),
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=ours,
                plain=plain,
                # x, cond, uncond -> out in fp32; dout -> dcond, duncond (dx is dout itself)
                bytes={"fwd": n * (8 + 2 * size), "bwd": n * (4 + 2 * size)},
                flops={"fwd": 5 * n, "bwd": 2 * n},
                grads=("x", "cond", "uncond"),
            )
