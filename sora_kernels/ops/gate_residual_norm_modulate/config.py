"""Launch configurations of gate_residual_norm_modulate: pure functions of shape, dtype and chip."""

from __future__ import annotations

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    block_d: int  # power of two >= D: one program holds whole rows in registers
    block_rows: int  # rows per program
    num_warps: int


class BackwardConfig(NamedTuple):
    block_d: int
    block_tokens: int  # sorted tokens per program; fixes the order of summation
    num_warps: int


MAX_WIDTH = 16384  # beyond this a row no longer fits the registers of one program

_MAX_PROGRAMS = 2048  # of the backward: enough to fill any chip, few enough partial sums


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(width: int) -> ForwardConfig:
    """One row per program from D = 1024 on; narrower rows share one, so that loads stay wide."""
    block_d = max(next_power_of_2(width), 16)
    block_rows = max(1, 2048 // block_d) if block_d < 1024 else 1
    num_warps = min(max(block_d * block_rows // 512, 1), 16)
    return ForwardConfig(block_d, block_rows, num_warps)


def backward(tokens: int, width: int, sums: int) -> BackwardConfig:
    """``sums``: how many running sums of length D a program keeps in registers.

    At most about 8 fp32 values per array and thread: four inputs, xhat and the sums must all fit.
    """
    block_d = max(next_power_of_2(width), 16)
    num_warps = min(max(block_d // (32 * 8), 1), 32)
    block_tokens = min(max(-(-tokens // _MAX_PROGRAMS), 1), 64)
    return BackwardConfig(block_d, next_power_of_2(block_tokens), num_warps)
