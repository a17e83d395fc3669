"""Launch configurations of norm_modulate: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple

from .._config import (
    MAX_WIDTH,
    ForwardConfig,
    block_tokens,
    forward_rows,
    load_stages,
    next_power_of_2,
)
from .._tables import Chip, chip_of, tuned

__all__ = ["MAX_WIDTH", "BackwardConfig", "backward", "chip_of", "forward"]


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int
    num_stages: int  # of the loop over tokens


def forward(width: int, chip: Chip | None = None) -> ForwardConfig:
    """Whole rows in registers; narrow rows share a program."""
    fields = ("block_rows", "num_warps")
    return tuned("norm_modulate", "forward", forward_rows(width), fields, chip, width=width)


def backward(
    tokens: int, width: int, streams: int, itemsize: int, chip: Chip | None = None
) -> BackwardConfig:
    """Eight fp32 values per array and thread (sixteen of rows above 4096): x, dy and the sums must
    all fit its registers.

    ``streams``: how many rows of D numbers, ``itemsize`` bytes each, a token reads.
    """
    block_d = max(next_power_of_2(width), 16)
    num_warps = min(max(block_d // (32 * 8), 1), 16)
    stages = load_stages(streams * block_d * itemsize)
    default = BackwardConfig(block_d, block_tokens(tokens), num_warps, stages)
    fields = ("num_warps", "num_stages")
    return tuned("norm_modulate", "backward", default, fields, chip, width=width)
