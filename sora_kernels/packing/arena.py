"""One buffer for all index tensors of a layout, so that they reach the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

# Section starts keep Triton's 16-byte pointer specialisation, and a cache line.
_ALIGN = 64
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


@dataclass(frozen=True)
class Section:
    """Where one tensor lies in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def pack(
    arrays: Mapping[str, npt.NDArray[Any]], pin: bool = False
) -> tuple[Tensor, dict[str, Section]]:
    """Copies int32 and int64 arrays into one uint8 host buffer, pinned if it goes to a GPU."""
    sections: dict[str, Section] = {}
    total = 0
    for name, array in arrays.items():
        sections[name] = Section(_DTYPES[array.dtype], array.shape, total)
        total += -(-array.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=pin)
    raw = buffer.numpy()
    for name, array in arrays.items():
        start = sections[name].start
        raw[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
    return buffer, sections


def unpack(buffer: Tensor, sections: Mapping[str, Section]) -> dict[str, Tensor]:
    """Tensors over the sections of `buffer`, each with a storage of its own, at offset 0.

    Not views of it: torch.compile would replay the views, with their changes of dtype, for each
    input, and would take their storage offsets for sizes, tie them to sizes that happen to be
    equal and compile again when they differ. DLPack hands over the memory alone.
    """
    tensors = {}
    for name, section in sections.items():
        empty = torch.empty(0, dtype=section.dtype, device=buffer.device)
        stride = [1] * len(section.shape)
        for i in range(len(section.shape) - 1, 0, -1):
            stride[i - 1] = stride[i] * section.shape[i]
        tensor = empty.set_(
            buffer.untyped_storage(), section.start // empty.element_size(), section.shape, stride
        )
        tensors[name] = tensor if tensor.is_meta else from_dlpack(to_dlpack(tensor))
    return tensors
