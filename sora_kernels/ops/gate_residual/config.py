"""Launch configurations of gate_residual: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple

from .._config import MAX_WIDTH, ForwardConfig, block_tokens, forward_rows, next_power_of_2

__all__ = ["MAX_WIDTH", "BackwardConfig", "backward", "forward"]

_SLICE = 1024  # columns per program where nothing needs the whole row


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int


def forward(width: int, norm: bool) -> ForwardConfig:
    """Whole rows if a norm must see them, else slices of them; narrow rows share a program."""
    return forward_rows(width, MAX_WIDTH if norm else _SLICE)


def backward(tokens: int, width: int, norm: bool) -> BackwardConfig:
    """At most about 16 fp32 values per array and thread: dout, y and the sums must all fit."""
    block_d = min(max(next_power_of_2(width), 16), MAX_WIDTH if norm else _SLICE)
    num_warps = min(max(block_d // (32 * 8), 1), 32)
    return BackwardConfig(block_d, block_tokens(tokens, -(-width // block_d)), num_warps)
