"""Launch configuration that the row-wise ops share: pure functions of shape, without Triton."""

from __future__ import annotations

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    block_d: int  # power of two; covers the row where something needs all of it
    block_rows: int  # rows per program
    num_warps: int


MAX_WIDTH = 16384  # beyond this a row no longer fits the registers of one program

MAX_PROGRAMS = 2048  # of a backward: enough to fill any chip, few enough partial sums


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward_rows(width: int, most: int = MAX_WIDTH) -> ForwardConfig:
    """Programs of at least 2048 elements: narrow rows share one, so that loads stay wide.

    Rows wider than ``most`` are cut into slices of it.
    """
    block_d = min(max(next_power_of_2(width), 16), most)
    block_rows = max(1, 2048 // block_d)
    return ForwardConfig(block_d, block_rows, min(max(block_d * block_rows // 512, 1), 16))


def block_tokens(tokens: int, slices: int = 1) -> int:
    """Sorted tokens per program of a backward, a power of two; fixes the order of summation."""
    return next_power_of_2(min(max(-(-tokens * slices // MAX_PROGRAMS), 1), 64))
