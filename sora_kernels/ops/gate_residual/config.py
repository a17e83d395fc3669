"""Launch configurations of gate_residual: pure functions of shape, dtype and chip."""

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

_SLICE = 1024  # columns per program where nothing needs the whole row


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int
    num_stages: int  # of the loop over tokens


def forward(width: int, norm: bool, chip: Chip | None = None) -> ForwardConfig:
    """Whole rows if a norm must see them, else slices of them; narrow rows share a program."""
    default = forward_rows(width, MAX_WIDTH if norm else _SLICE)
    fields = ("block_rows", "num_warps") if norm else default._fields
    return tuned("gate_residual", "forward", default, fields, chip, width=width, norm=norm)


def backward(
    tokens: int, width: int, norm: bool, itemsize: int, chip: Chip | None = None
) -> BackwardConfig:
    """Eight fp32 values per array and thread (more of rows above 4096): dout, y and the sums must
    all fit. ``itemsize``: bytes of a number of dout and y."""
    block_d = min(max(next_power_of_2(width), 16), MAX_WIDTH if norm else _SLICE)
    num_warps = min(max(block_d // (32 * 8), 1), 16)
    default = BackwardConfig(block_d, 0, num_warps, load_stages(2 * block_d * itemsize))
    fields = ("num_warps", "num_stages") if norm else ("block_d", "num_warps", "num_stages")
    found = tuned("gate_residual", "backward", default, fields, chip, width=width, norm=norm)
    return found._replace(block_tokens=block_tokens(tokens, -(-width // found.block_d)))
