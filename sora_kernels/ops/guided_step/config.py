"""Launch configuration of guided_step: a pure function of the width."""

from __future__ import annotations

from typing import NamedTuple

from .._config import forward_rows


class Config(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


def choose_config(width: int) -> Config:
    """About 2048 elements per program, 16 per thread; any width is covered by slices."""
    block_d, block_rows, num_warps = forward_rows(width, 1024)
    return Config(block_rows, block_d, num_warps)
