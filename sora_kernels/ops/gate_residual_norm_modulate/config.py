"""Launch configurations of gate_residual_norm_modulate: pure functions of shape, dtype and chip."""

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

__all__ = ["MAX_WIDTH", "BackwardConfig", "backward", "chip_of", "forward", "most_registers"]

_OP = "gate_residual_norm_modulate"
_SLICE = 4096  # columns of the backward: three sums and the inputs of more would spill


class BackwardConfig(NamedTuple):
    block_d: int  # power of two; columns per program
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    slices: int  # programs per block of tokens; more than one if D > block_d
    num_warps: int
    num_stages: int  # of the loop over tokens


def forward(width: int, chip: Chip | None = None) -> ForwardConfig:
    """Whole rows in registers; narrow rows share a program."""
    fields = ("block_rows", "num_warps")
    return tuned(_OP, "forward", forward_rows(width), fields, chip, width=width)


def backward(
    tokens: int, width: int, streams: int, itemsize: int, chip: Chip | None = None
) -> BackwardConfig:
    """Eight fp32 values per array and thread: inputs, xhat and up to six sums must all fit.

    ``streams``: how many rows of D numbers, ``itemsize`` bytes each, a token reads.
    """
    block_d = min(max(next_power_of_2(width), 16), _SLICE)
    slices = -(-width // block_d)
    num_warps = max(block_d // (32 * 8), 1)
    stages = load_stages(streams * block_d * itemsize)
    default = BackwardConfig(block_d, block_tokens(tokens, slices), slices, num_warps, stages)
    return tuned(_OP, "backward", default, ("num_warps", "num_stages"), chip, width=width)


def most_registers(kept: int) -> int | None:
    """Limit per thread of the backward: two programs of eight warps share a multiprocessor, or one
    of sixteen fills it.

    The compiler alone takes 168 registers where it can do with 112, and halves the programs. With
    more than five vectors ``kept`` through a run (sums, gates, scale, weight, bias) it needs them.
    """
    return 120 if kept <= 5 else None
