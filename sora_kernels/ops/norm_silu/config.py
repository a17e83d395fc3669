"""Launch configurations of norm_silu: pure functions of shape and layout."""

from __future__ import annotations

from typing import NamedTuple

from .._config import load_stages
from .._tables import Chip, chip_of, remembered, tuned

__all__ = ["MAX_WIDTH", "MERGE", "Config", "chip_of", "chunk", "columns", "group", "rms", "stages"]


class Config(NamedTuple):
    block_l: int  # positions of a tile
    block_c: int  # channels of a tile
    num_warps: int


MAX_WIDTH = 4096  # RMS holds all channels of a tile in registers

MERGE = 4096  # partial sums that a program merges at a time

_MAX_PROGRAMS = 2048  # of a reduction: enough to fill any chip, few enough partial sums


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@remembered
def rms(
    width: int, channels_last: bool, backward: bool = False, chip: Chip | None = None
) -> Config:
    """A tile holds all channels. Channels first, 16 positions at least: 32 bytes of bf16."""
    block_c = max(next_power_of_2(width), 16)
    elements = 2048 if channels_last and backward else 4096
    block_l = max(elements // block_c, 1 if channels_last else 16)
    per_thread = 8 if backward else 32
    num_warps = min(max(block_l * block_c // (32 * per_thread), 1), 16)
    default = Config(block_l, block_c, num_warps)
    kernel = "rms_backward" if backward else "rms_forward"
    fields = ("block_l", "num_warps")
    return tuned("norm_silu", kernel, default, fields, chip, width=width, last=channels_last)


def columns(width: int) -> tuple[int, int]:
    """Channels of the two blocks that cover ``width``; the second is 0 where one is full enough."""
    block = max(next_power_of_2(width), 16)
    if block >= 64 and width <= block // 4 * 3:
        return block // 2, block // 4
    return block, 0


@remembered
def group(width: int, channels_last: bool, chip: Chip | None = None) -> Config:
    """Tiles of part of the channels, long in the direction that is contiguous."""
    block_c = min(max(next_power_of_2(width), 16), 128 if channels_last else 16)
    default = Config(2048 // block_c, block_c, 4)
    shape = {"width": width, "last": channels_last}
    return tuned("norm_silu", "group", default, default._fields, chip, **shape)


def stages(tile: Config, streams: int, itemsize: int) -> int:
    """Of a loop over tiles of ``streams`` tensors: this one and up to two that are being loaded."""
    return min(load_stages(streams * tile.block_l * tile.block_c * itemsize), 3)


def chunk(positions: int, block_l: int, parts: int) -> int:
    """Positions that one program of a reduction runs through; fixes the order of summation.

    ``parts``: regions times slices of channels, each of which has programs of its own.
    """
    per_region = max(_MAX_PROGRAMS // max(parts, 1), 1)
    tiles = -(-positions // (block_l * per_region))
    return next_power_of_2(max(tiles, 1)) * block_l
