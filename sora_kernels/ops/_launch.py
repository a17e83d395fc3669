"""One way to launch a Triton kernel, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Arguments that change with every pack: what they are divisible by must not make another kernel.
# Only that a row may be one token is worth knowing.
SIZES: Any = {
    "do_not_specialize": ("tokens", "per_batch", "block_tokens", "slices", "share"),
    "do_not_specialize_on_alignment": ("tokens_per_row",),
}


def cdiv(number: int, size: int) -> int:
    """``number / size`` rounded up. (`triton.cdiv` takes seventy times as long on the host.)"""
    return -(-number // size)


def row_stride(matrix: Tensor | None) -> int:
    """Stride between the rows of a modulation; 0 for an absent one."""
    return 0 if matrix is None else matrix.stride(0)


def token_strides(x: Tensor | None) -> tuple[int, int]:
    """Batch and token stride of a ``[B, L, D]`` tensor; zeros for an absent one.

    Also 0 for a batch of one: its number, which changes with every pack, would decide for Triton
    whether accesses are aligned (and beyond 2^31 be of another type), each time a new kernel.
    """
    if x is None:
        return 0, 0
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def per_batch(*tensors: Tensor | None) -> int | None:
    """L of these ``[B, L, D]`` tensors, by which `token_offset` divides token numbers.

    None where token n of each lies at n token strides, over all batches: most do, and their kernels
    need no division.
    """
    given = [x for x in tensors if x is not None]
    if all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in given):
        return None
    return given[0].shape[1]


def run_stages(stages: int, grouped: bool, index: Tensor | None, tokens_per_row: int) -> int:
    """Stages of a loop over the tokens of a row: none to pipeline where a row is one token."""
    return 1 if grouped and index is None and tokens_per_row == 1 else stages


def modulation_grad(like: Tensor, want: int, of: Tensor | None, table: Tensor | None) -> Tensor:
    """Memory for the gradient of a modulation, empty if it is absent or not wanted.

    A gradient that is summed further, over rows (for its table), stays fp32.
    """
    if not want or of is None:
        return like.new_empty(0, dtype=torch.float32)
    return of.new_empty(of.shape, dtype=of.dtype if table is None else torch.float32)


def vector_partials(like: Tensor, want: int, blocks: int, width: int) -> Tensor:
    """Memory for the sums of each block of tokens, of a ``[D]`` gradient."""
    return like.new_empty(blocks if want else 0, width, dtype=torch.float32)


def vector_grad(partials: Tensor, want: int) -> Tensor:
    """Stage two of a ``[D]`` gradient: torch.sum over the blocks is deterministic."""
    return partials.sum(0) if want else partials.flatten()


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Runs ``kernel[grid](*args, **meta)`` with ``device`` current; an empty grid is a no-op."""
    if 0 in grid:
        return
    index = device.index  # None on the CPU; quicker than to compare types, which are strings
    if index is None or index == torch.cuda.current_device():
        kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
