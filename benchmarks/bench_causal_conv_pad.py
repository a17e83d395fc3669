"""causal_conv_pad: the inputs of a video VAE's causal convolutions, one chunk of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import causal_conv_pad

from .registry import DTYPES, Case, Context, Inputs, op_cases

# (channels, frames, height, width, spatial pad): Wan's decoder at 480p, from its last stage (3x3x3
# convolutions, 4 frames a latent) to its first, and a (2+1)D convolution that pads time alone.
SHAPES = ((96, 4, 240, 208, 1), (192, 4, 120, 208, 1), (384, 2, 60, 104, 1), (96, 4, 240, 208, 0))
# The same stages at 720p.
CUDA = ((96, 4, 720, 640, 1), (192, 4, 360, 640, 1), (384, 2, 180, 320, 1))
PAST = 2


def inputs(
    channels: int, frames: int, height: int, width: int, pad: int, dtype: str, device: torch.device
) -> Inputs:
    def randn(count: int) -> Tensor:
        x = torch.randn(1, channels, count, height, width, device=device).to(DTYPES[dtype])
        return x.contiguous(memory_format=torch.channels_last_3d)

    return {"x": randn(frames), "cache": randn(PAST), "pad": pad}


def ours(x: Tensor, cache: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    return causal_conv_pad(x, cache, pad_t=PAST, pad_h=pad, pad_w=pad)


def plain(x: Tensor, cache: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Wan's CausalConv3d: the cache in front, then the padding, and a copy of the last frames."""
    new_cache = x[:, :, -PAST:].clone()
    whole = torch.cat([cache, x], 2)
    return F.pad(whole, (pad, pad, pad, pad)) if pad else whole, new_cache


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for shape in context.pick(quick=SHAPES[:1], full=SHAPES, cuda=CUDA):
            channels, frames, height, width, pad = shape
            frame = channels * height * width * DTYPES[dtype].itemsize
            around = channels * (height + 2 * pad) * (width + 2 * pad) * DTYPES[dtype].itemsize
            moved = (frames + PAST) * (frame + around) + PAST * frame
            yield from op_cases(
                "causal_conv_pad",
                f"{channels}x{frames}x{height}x{width} pad={pad}",
                dtype,
                inputs=partial(inputs, *shape, dtype),
                ours=ours,
                plain=plain,
                bytes={"fwd": moved, "bwd": moved},
                flops={"fwd": 0, "bwd": 0},
                grads=("x", "cache"),
            )
