"""Launch configurations of norm_modulate: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple

from .._config import MAX_WIDTH, ForwardConfig, block_tokens, forward_rows, next_power_of_2
from .._tables import Chip, chip_of, tuned

__all__ = ["MAX_WIDTH", "BackwardConfig", "backward", "chip_of", "forward"]


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int


def forward(width: int, chip: Chip | None = None) -> ForwardConfig:
    """Whole rows in registers; narrow rows share a program."""
    fields = ("block_rows", "num_warps")
    return tuned("norm_modulate", "forward", forward_rows(width), fields, chip, width=width)


def backward(tokens: int, width: int, sums: int, chip: Chip | None = None) -> BackwardConfig:
    """``sums``: how many running sums of length D a program keeps in registers.

    At most about 16 fp32 values per array and thread: x, dy, xhat and the sums must all fit.
    """
    block_d = max(next_power_of_2(width), 16)
    per_thread = 16 if sums <= 2 else 8
    num_warps = min(max(block_d // (32 * per_thread), 1), 32)
    default = BackwardConfig(block_d, block_tokens(tokens), num_warps)
    shape = {"width": width, "sums": sums}
    return tuned("norm_modulate", "backward", default, ("num_warps",), chip, **shape)
