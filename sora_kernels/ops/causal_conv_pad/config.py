"""Launch configuration of causal_conv_pad: a pure function of the length of a row."""

from __future__ import annotations

from typing import NamedTuple

from .._tables import Chip, chip_of, remembered, tuned

__all__ = ["Config", "chip_of", "choose_config"]


class Config(NamedTuple):
    block_rows: int  # rows (one h of one frame) per program
    block_row: int  # elements of a row
    num_warps: int


@remembered
def choose_config(row: int, chip: Chip | None = None) -> Config:
    """4096 elements a program; short rows (channels first, small frames) share one."""
    block_row = min(max(1 << max(row - 1, 0).bit_length(), 16), 4096)
    default = Config(4096 // block_row, block_row, 8)
    return tuned("causal_conv_pad", "all", default, default._fields, chip, row=row)
