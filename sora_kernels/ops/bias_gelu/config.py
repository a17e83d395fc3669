"""Launch configurations of bias_gelu: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

from .._config import block_tokens, forward_rows

_SLICE = 1024  # columns per program: any width is covered by slices


class ForwardConfig(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


class BackwardConfig(NamedTuple):
    block_tokens: int  # tokens per program; fixes the order of summation
    block_d: int
    num_warps: int


def forward(width: int) -> ForwardConfig:
    """About 2048 elements per program, 16 per thread."""
    block_d, block_rows, num_warps = forward_rows(width, _SLICE)
    return ForwardConfig(block_rows, block_d, num_warps)


def backward(tokens: int, width: int) -> BackwardConfig:
    """One row at a time, so that a program's share of dbias stays in registers."""
    block_d = forward_rows(width, _SLICE).block_d
    slices = -(-width // block_d)
    return BackwardConfig(block_tokens(tokens, slices), block_d, max(min(block_d // 256, 4), 1))
