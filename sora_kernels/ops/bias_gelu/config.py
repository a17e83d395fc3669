"""Launch configurations of bias_gelu: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

from .._config import block_tokens, column_slice, forward_rows, load_stages
from .._tables import Chip, chip_of, remembered, tuned

__all__ = ["BackwardConfig", "ForwardConfig", "backward", "chip_of", "forward"]


class ForwardConfig(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


class BackwardConfig(NamedTuple):
    block_tokens: int  # tokens per program; fixes the order of summation
    block_rows: int  # of these at a time
    block_d: int
    num_warps: int
    num_stages: int  # of the loop over them


@remembered
def forward(width: int, chip: Chip | None = None) -> ForwardConfig:
    """About 2048 elements per program, 16 per thread."""
    block_d, block_rows, num_warps = forward_rows(width, column_slice(width))
    default = ForwardConfig(block_rows, block_d, num_warps)
    return tuned("bias_gelu", "forward", default, default._fields, chip, width=width)


@remembered
def backward(tokens: int, width: int, itemsize: int, chip: Chip | None = None) -> BackwardConfig:
    """16 elements per thread of x and of dy at a time, and warps next to each other along a row.

    (With warps above each other Triton 3.6 computes a tile twice: for the store, and for the sum.)
    """
    block_d = forward_rows(width, column_slice(width)).block_d
    num_warps = max(block_d // 256, 1)
    block_rows = num_warps * 512 // block_d
    stages = min(load_stages(2 * block_rows * block_d * itemsize), 3)
    default = BackwardConfig(0, block_rows, block_d, num_warps, stages)
    fields = ("block_rows", "block_d", "num_warps", "num_stages")
    found = tuned("bias_gelu", "backward", default, fields, chip, width=width)
    parts = max(-(-width // found.block_d) * found.num_warps // 4, 1)
    return found._replace(block_tokens=max(block_tokens(tokens, parts), found.block_rows))
