"""Launch configurations of gate_residual_norm_modulate: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    block_d: int  # power of two >= D: one program holds whole rows in registers
    block_rows: int  # rows per program
    num_warps: int


class BackwardConfig(NamedTuple):
    block_d: int  # power of two; columns per program
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    slices: int  # programs per block of tokens; more than one if D > block_d
    num_warps: int


MAX_WIDTH = 16384  # of the forward: beyond this a row no longer fits the registers of one program

_MAX_PROGRAMS = 2048  # of the backward: enough to fill any chip, few enough partial sums
_MAX_SLICE = 4096  # of the backward: three sums and the inputs of more columns would spill


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(width: int) -> ForwardConfig:
    """One row per program from D = 1024 on; narrower rows share one, so that loads stay wide."""
    block_d = max(next_power_of_2(width), 16)
    block_rows = max(1, 2048 // block_d) if block_d < 1024 else 1
    num_warps = min(max(block_d * block_rows // 512, 1), 16)
    return ForwardConfig(block_d, block_rows, num_warps)


def backward(tokens: int, width: int) -> BackwardConfig:
    """Eight fp32 values per array and thread: inputs, xhat and up to six sums must all fit."""
    block_d = min(max(next_power_of_2(width), 16), _MAX_SLICE)
    slices = -(-width // block_d)
    num_warps = max(block_d // (32 * 8), 1)
    block_tokens = min(max(-(-tokens * slices // _MAX_PROGRAMS), 1), 64)
    return BackwardConfig(block_d, next_power_of_2(block_tokens), slices, num_warps)
