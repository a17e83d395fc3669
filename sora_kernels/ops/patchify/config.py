"""Launch configuration of patchify: a pure function of the row of a grid and the token width."""

from __future__ import annotations

from typing import NamedTuple

from .._tables import Chip, chip_of, remembered, tuned

__all__ = ["Config", "chip_of", "choose_config"]


class Config(NamedTuple):
    block_w: int  # tokens along w
    block_f: int  # features
    num_warps: int


@remembered
def choose_config(grid_w: int, features: int, chip: Chip | None = None) -> Config:
    """At most 4096 elements, features first: they are what is contiguous in the token matrix."""
    block_f = min(1 << (features - 1).bit_length(), 256)
    block_w = min(1 << (grid_w - 1).bit_length(), 4096 // block_f)
    default = Config(block_w, block_f, 4 if block_w * block_f > 512 else 1)
    shape = {"grid_w": grid_w, "features": features}
    return tuned("patchify", "all", default, default._fields, chip, **shape)
