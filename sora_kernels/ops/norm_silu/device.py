"""What the Triton kernels of norm_silu share: tiles of [B, F, L, C] tensors by strides, the
launcher's side of them, and the shape of an AOT case."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import load_f32
from . import config, new_like_raw


@triton.jit
def affine(weight_ptr, bias_ptr, c, mask):
    """weight and bias at channels ``c``; 1 and 0 where there are none."""
    weight = tl.where(mask, 1.0, 0.0)
    bias = tl.zeros_like(weight)
    if weight_ptr is not None:
        weight = load_f32(weight_ptr + c, mask)
    if bias_ptr is not None:
        bias = load_f32(bias_ptr + c, mask)
    return weight, bias


@triton.jit
def _at(ptr, region, frames, l, c, s_b, s_f, s_l, s_c):  # noqa: E741
    """All in int64: channels first, the last channel of one long video lies beyond 2^31."""
    start = (region // frames) * s_b + (region % frames) * s_f
    return ptr + start + l * s_l + c.to(tl.int64) * s_c


@triton.jit
def load_tile(ptr, region, frames, l, c, s_b, s_f, s_l, s_c, mask):  # noqa: E741
    """Positions ``l`` and channels ``c`` of a region (one frame of one sample), as fp32."""
    return load_f32(_at(ptr, region, frames, l, c, s_b, s_f, s_l, s_c), mask)


@triton.jit
def groups_of(region, c, width, GROUP: tl.constexpr):
    """The group of channels ``c`` of a region, counted over all regions; GROUP channels each.

    A constant: a division by a number known at run time only is eighteen instructions per channel.
    """
    return region * (width // GROUP) + c // GROUP


@triton.jit
def store_tile(ptr, value, region, frames, l, c, s_b, s_f, s_l, s_c, mask):  # noqa: E741
    at = _at(ptr, region, frames, l, c, s_b, s_f, s_l, s_c)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


def strides_of(x: Tensor, last: bool) -> tuple[int, ...]:
    """Of [B, F, L, C]; the unit one is exact even where that dimension has size 1."""
    b, f, l, c = x.stride()  # noqa: E741
    return (b, f, l, 1) if last else (b, f, 1, c)


def new_result(x: Tensor, last: bool) -> tuple[Tensor, tuple[int, ...]]:
    """New memory for y or dx and its strides as [B, F, L, C]."""
    out = new_like_raw(x, last)
    return out, strides_of(out if last else out.permute(0, 2, 3, 1), last)


def case(
    name: str,
    kernel: Any,
    tile: config.Config,
    last: bool,
    tensors: str,
    pointers: str,
    scalars: str,
    constants: dict[str, object],
    narrow_store_ok: bool = False,
    small: bool = False,
) -> AotCase:
    """``tensors`` and ``pointers`` name bf16 and fp32 pointers, ``scalars`` integers; ``small``:
    a kernel of partial sums, whose accesses need not be wide."""
    unit = "c" if last else "l"
    given = dict.fromkeys(tensors.split(), "*bf16") | dict.fromkeys(pointers.split(), "*fp32")
    names = [n for n in kernel.arg_names if n[1:] in ("_b", "_f", "_l", "_c")]
    strides = [n for n in names if n[2] != unit]
    floats = [n for n in kernel.arg_names if n in ("eps", "floor", "ceiling")]
    blocks = {"BLOCK_L": tile.block_l, "BLOCK_C": tile.block_c}
    return AotCase(
        name=f"{name}_{'last' if last else 'first'}",
        kernel=kernel,
        signature=given
        | dict.fromkeys((*scalars.split(), *strides), "i32")
        | dict.fromkeys(floats, "fp32"),
        constexprs=constants
        | dict.fromkeys([n for n in names if n[2] == unit], 1)
        | {name: size for name, size in blocks.items() if name in kernel.arg_names},
        num_warps=8 if small else tile.num_warps,
        memory_bound=not small,
        divisible=(*given, *strides, *({"length", "width", "chunk"} & set(scalars.split()))),
        narrow_store_ok=narrow_store_ok,
    )  # fmt: skip
