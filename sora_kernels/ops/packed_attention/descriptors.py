"""Tensor descriptors of packed q, k, v and dout: what the TMA unit of sm_90 and newer reads by.

They are made on the host and travel as kernel arguments, so a launch needs no scratch memory and
a CUDA graph holds them by value.

A load names its first row and where the rows of its segment or range end, and the unit fills the
rest with zeros. A descriptor has no such end, so it is given two more axes (as in Triton's
`tools/ragged_tma.py`): the box lies at rows `[FAR - left, FAR - left + block)` of an axis of FAR
rows, and the steps along the other two bring it back to its address, modulo 2^64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import FAR, Config, Launch, wants_descriptors


def describe(
    launch: Launch, config: Config, blocks: tuple[int, ...], *tensors: Tensor
) -> list[TensorDescriptor | None]:
    """Per block and tensor `[N, H, D]` the descriptors of columns `[0, dim1)` and of the rest.

    All None where the kernel shall read by pointers, see `config.wants_descriptors`; the second of
    a pair None where the head dim is one piece. Boxes are `block` rows of one head, columns beyond
    D are zero. `kernels._load_block` reads them.
    """
    if not wants_descriptors(launch, *tensors):
        return [None] * (2 * len(blocks) * len(tensors))
    places = [(x, (x.dtype, *x.shape[1:], *x.stride()[:2])) for x in tensors]
    return [
        _descriptor(x, _geometry(*place, block, width)) if width else None
        for block in blocks
        for x, place in places
        for width in (config.dim1, config.dim2)
    ]


def _descriptor(x: Tensor, geometry: dict[str, Any]) -> TensorDescriptor:
    """Without its constructor, whose checks of a known geometry take longer than all else here."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(geometry, base=x)
    return made


@lru_cache(maxsize=1024)
def _geometry(
    dtype: torch.dtype, heads: int, head_dim: int, stride_n: int, stride_h: int, block: int,
    width: int,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a descriptor except its base. The head is the axis before the rows, so that
    a box without its axes of one is a matrix."""
    most = 2**31 - 2**16
    shape = [most, most, heads, FAR, head_dim]
    strides = [2**34 - stride_n, stride_n, stride_h, stride_n, 1]
    aligned = torch.empty(0, dtype=dtype)
    checked = TensorDescriptor(aligned, shape, strides, [1, 1, 1, block, width])
    return {name: value for name, value in vars(checked).items() if name != "base"}
