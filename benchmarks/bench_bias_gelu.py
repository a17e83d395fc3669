"""bias_gelu: a Linear's bias and GELU, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import bias_gelu

from .registry import DTYPES, Case, Context, Inputs, op_cases

# (tokens, width of the MLP): DiT-S, DiT-XL, Wan 1.3B
SHAPES = ((4096, 1536), (4096, 4608), (4096, 8960))
CUDA = ((32768, 4608), (32768, 8960))


def plain(x: Tensor, bias: Tensor) -> Tensor:
    """The bias add of a Linear's product and GELU. (`F.linear` adds it beside the product.)"""
    return F.gelu(x + bias, approximate="tanh")


def inputs(tokens: int, width: int, dtype: str, device: torch.device) -> Inputs:
    return {
        "x": torch.randn(tokens, width, device=device).to(DTYPES[dtype]),
        "bias": torch.randn(width, device=device).to(DTYPES[dtype]),
    }


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for tokens, width in context.pick(quick=SHAPES[1:2], full=SHAPES, cuda=CUDA):
            size = DTYPES[dtype].itemsize
            yield from op_cases(
                "bias_gelu",
                f"{tokens}x{width}",
                dtype,
                inputs=partial(inputs, tokens, width, dtype),
                ours=bias_gelu,
                plain=plain,
                # x -> y; dy, x -> dx, dbias
                bytes={
                    "fwd": size * width * (2 * tokens + 1),
                    "bwd": size * width * (3 * tokens + 2),
                },
                flops={"fwd": 12 * tokens * width, "bwd": 20 * tokens * width},
                grads=("x", "bias"),
            )
