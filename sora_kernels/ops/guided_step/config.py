"""Launch configuration of guided_step: a pure function of the width."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


def choose_config(width: int) -> Config:
    """About 2048 elements per program, 16 per thread; any width is covered by slices."""
    block_d = max(min(1 << (width - 1).bit_length(), 1024), 16)
    return Config(max(1, 2048 // block_d), block_d, 4)
