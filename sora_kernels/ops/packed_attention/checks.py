"""What `packed_attention` accepts: one set of checks for eager, fake and compiled calls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...packing.windows import Window

if TYPE_CHECKING:
    from ...packing import PackedLayout

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if x.ndim != 3:
            raise ValueError(f"{name}: expected [tokens, heads, head dim], got {tuple(x.shape)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: expected stride 1 in the last dimension, got {x.stride()}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, got {q.shape[2]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected the head dim of q, {q.shape[2]}, got {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, x: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [segments + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name}: expected the device of q, {x.device}, got {cu_seqlens.device}")


def check_max_seqlen(name: str, value: Any, default: int) -> int:
    """A host integer: a tensor would be waited for."""
    if value is None:
        return default
    integer = isinstance(value, (int, torch.SymInt))
    if not integer:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    length: int = value
    if length < 0:
        raise ValueError(f"{name}: expected at least 0, got {length}")
    return length


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return float(head_dim**-0.5)
    scale = float(softmax_scale)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"softmax_scale: expected a finite number >= 0, got {softmax_scale}")
    return scale


def check_windowed(
    q: Tensor, k: Tensor, layout: PackedLayout | None, window: Any,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
) -> Window:  # fmt: skip
    """What a window asks for beyond the other checks; returns it as a `Window`."""
    tiles = Window.of(window)
    for name, given in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if given is not None:
            raise ValueError(
                f"{name}: expected None with a window, which needs the grids of a layout, got a "
                "tensor"
            )
    if layout is None:
        raise ValueError("layout: expected a layout in tile order with a window, got None")
    if causal:
        raise ValueError(
            "causal: expected False with a window, got True; Window(size, causal=True) is "
            "block-causal in time"
        )
    if layout.num_tokens != q.shape[0]:
        raise ValueError(f"layout: expected {q.shape[0]} tokens, got {layout.num_tokens}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k: expected the {q.shape[0]} tokens of q with a window, got {k.shape[0]}"
        )
    check_cu_seqlens("layout", layout.cu_seqlens, q)
    layout.window_table()  # raster order, or two grids to be made
    return tiles


def host_lengths(name: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """The segment lengths as Python ints; on a GPU this waits for the device."""
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    if ends[0] != 0 or ends[-1] != num_tokens or min(lengths, default=0) < 0:
        shown = ends if len(ends) <= 8 else f"{ends[0]}, ..., {ends[-1]}"
        raise ValueError(
            f"{name}: expected to rise from 0 to {num_tokens}, the number of tokens, got {shown}"
        )
    return lengths
