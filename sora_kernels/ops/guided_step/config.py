"""Launch configuration of guided_step: a pure function of the width."""

from __future__ import annotations

from typing import NamedTuple

from .._config import column_slice, forward_rows
from .._tables import Chip, chip_of, remembered, tuned

__all__ = ["Config", "chip_of", "choose_config"]


class Config(NamedTuple):
    block_rows: int  # tokens per program
    block_d: int
    num_warps: int


@remembered
def choose_config(width: int, chip: Chip | None = None) -> Config:
    """About 2048 elements per program, 16 per thread; any width is covered by slices."""
    block_d, block_rows, num_warps = forward_rows(width, column_slice(width))
    default = Config(block_rows, block_d, num_warps)
    return tuned("guided_step", "all", default, default._fields, chip, width=width)
