"""Launch configurations of gate_residual: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    block_d: int  # power of two; covers the row if the branch is normalised
    block_rows: int  # tokens per program
    num_warps: int


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int


MAX_WIDTH = 16384  # with a norm: beyond this a row no longer fits the registers of one program

_MAX_PROGRAMS = 2048  # of the backward: enough to fill any chip, few enough partial sums
_SLICE = 1024  # columns per program where nothing needs the whole row


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(width: int, norm: bool) -> ForwardConfig:
    """Whole rows if a norm must see them, else slices of them; narrow rows share a program."""
    block_d = max(next_power_of_2(width), 16)
    if not norm:
        block_d = min(block_d, _SLICE)
    block_rows = max(1, 2048 // block_d)
    num_warps = min(max(block_d * block_rows // 512, 1), 16)
    return ForwardConfig(block_d, block_rows, num_warps)


def backward(tokens: int, width: int, norm: bool) -> BackwardConfig:
    """At most about 16 fp32 values per array and thread: dout, y and the sums must all fit."""
    block_d = max(next_power_of_2(width), 16)
    if not norm:
        block_d = min(block_d, _SLICE)
    num_warps = min(max(block_d // (32 * 8), 1), 32)
    slices = -(-width // block_d)
    block_tokens = min(max(-(-tokens * slices // _MAX_PROGRAMS), 1), 64)
    return BackwardConfig(block_d, next_power_of_2(block_tokens), num_warps)
