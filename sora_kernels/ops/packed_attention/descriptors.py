"""Tensor descriptors of packed q, k, v and dout: what the TMA unit of sm_90 and newer reads by.

They are made on the host and travel as kernel arguments, so a launch needs no scratch memory and
a CUDA graph holds them by value. A load names the first row and how many rows are left to the end
of its segment or range; the unit fills what lies beyond with zeros ("ragged": Triton's own
construction of two more axes whose addresses wrap around 2^64, `triton.tools.ragged_tma`).
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config, Launch, wants_descriptors

__all__ = ["describe", "load_ragged"]


def describe(
    launch: Launch, config: Config, block: int, *tensors: Tensor
) -> list[TensorDescriptor | None]:
    """Per tensor `[N, H, D]` the descriptors of its columns `[0, dim1)` and `[dim1, dim1 + dim2)`.

    All None where the kernel shall read by pointers, see `config.wants_descriptors`; the second
    None where the head dim is one piece. Boxes are `block` rows of one head: `[1, block, width]`
    of `[H, N, D]`, so that dropping their first axis leaves a matrix. Columns beyond D are zero.
    """
    if not wants_descriptors(launch, *tensors):
        return [None] * (2 * len(tensors))
    return [
        create_ragged_descriptor(x.transpose(0, 1), [1, block, width], 1) if width else None
        for x in tensors
        for width in (config.dim1, config.dim2)
    ]
