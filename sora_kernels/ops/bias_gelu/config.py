"""Launch configurations of bias_gelu: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

_SLICE = 1024  # columns per program: any width is covered by slices
_MAX_PROGRAMS = 2048  # of the backward: enough to fill any chip, few enough partial sums


class ForwardConfig(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


class BackwardConfig(NamedTuple):
    block_tokens: int  # tokens per program; fixes the order of summation
    block_d: int
    num_warps: int


def _slice(width: int) -> int:
    return max(min(1 << (width - 1).bit_length(), _SLICE), 16)


def forward(width: int) -> ForwardConfig:
    """About 2048 elements per program, 16 per thread."""
    block_d = _slice(width)
    return ForwardConfig(max(1, 2048 // block_d), block_d, 4)


def backward(tokens: int, width: int) -> BackwardConfig:
    """One row at a time, so that a program's share of dbias stays in registers."""
    block_d = _slice(width)
    slices = -(-width // block_d)
    block_tokens = min(max(-(-tokens * slices // _MAX_PROGRAMS), 1), 64)
    return BackwardConfig(
        1 << (block_tokens - 1).bit_length(), block_d, max(min(block_d // 256, 4), 1)
    )
