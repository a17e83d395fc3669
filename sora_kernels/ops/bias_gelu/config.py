"""Launch configurations of bias_gelu: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

from .._config import block_tokens, forward_rows
from .._tables import Chip, chip_of, tuned

__all__ = ["BackwardConfig", "ForwardConfig", "backward", "chip_of", "forward"]

_SLICE = 1024  # columns per program: any width is covered by slices


class ForwardConfig(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


class BackwardConfig(NamedTuple):
    block_tokens: int  # tokens per program; fixes the order of summation
    block_d: int
    num_warps: int


def forward(width: int, chip: Chip | None = None) -> ForwardConfig:
    """About 2048 elements per program, 16 per thread."""
    block_d, block_rows, num_warps = forward_rows(width, _SLICE)
    default = ForwardConfig(block_rows, block_d, num_warps)
    return tuned("bias_gelu", "forward", default, default._fields, chip, width=width)


def backward(tokens: int, width: int, chip: Chip | None = None) -> BackwardConfig:
    """One row at a time, so that a program's share of dbias stays in registers."""
    block_d = forward_rows(width, _SLICE).block_d
    default = BackwardConfig(0, block_d, max(min(block_d // 256, 4), 1))
    fields = ("block_d", "num_warps")
    found = tuned("bias_gelu", "backward", default, fields, chip, width=width)
    slices = -(-width // found.block_d)
    return found._replace(block_tokens=block_tokens(tokens, slices))
