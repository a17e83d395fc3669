"""Launch configuration that the row-wise ops share: pure functions of shape, without Triton."""

from __future__ import annotations

from typing import NamedTuple


class ForwardConfig(NamedTuple):
    block_d: int  # power of two; covers the row where something needs all of it
    block_rows: int  # rows per program
    num_warps: int


MAX_WIDTH = 16384  # beyond this a row no longer fits the registers of one program

MAX_PROGRAMS = 1024  # of a backward: enough to fill any chip, few enough partial sums

STAGE_BYTES = 96 * 1024  # of shared memory for loads under way: all that an RTX 4090 or 5090 has


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward_rows(width: int, most: int = MAX_WIDTH) -> ForwardConfig:
    """Programs of at least 2048 elements: narrow rows share one, so that loads stay wide.

    Rows wider than ``most`` are cut into slices of it.
    """
    block_d = min(max(next_power_of_2(width), 16), most)
    block_rows = max(1, 2048 // block_d)
    return ForwardConfig(block_d, block_rows, min(max(block_d * block_rows // 512, 1), 16))


def column_slice(width: int) -> int:
    """Columns per program of an op that need not see whole rows: a power of two up to 1024.

    The largest one of which at most a sixteenth is empty, else the one that leaves least empty.
    """
    sizes = (1024, 512, 256)
    padded = [-(-width // size) * size for size in sizes]
    for size, total in zip(sizes, padded, strict=True):
        if total * 15 <= width * 16:
            return size
    return sizes[padded.index(min(padded))]


def block_tokens(tokens: int, slices: int = 1) -> int:
    """Sorted tokens per program of a backward, a power of two; fixes the order of summation."""
    return next_power_of_2(min(max(-(-tokens * slices // MAX_PROGRAMS), 1), 64))


def load_stages(bytes_per_token: int) -> int:
    """Stages of a loop over tokens: this one, and up to three whose loads are under way.

    An H200 needs about 29 KB under way per multiprocessor, loads and stores (4.8 TB/s, 0.8 us).
    """
    return min(4, 1 + STAGE_BYTES // max(bytes_per_token, 1))


def finish_tile(blocks: int, num_rows: int) -> tuple[int, int]:
    """Blocks and columns that a program of stage two adds at a time; fixes the order of summation.

    A row spans ``blocks / num_rows`` of them on average. Few columns make many programs, and many
    blocks at a time few loads that wait for each other: stage two is short and latency is its cost.
    """
    return min(max(next_power_of_2(-(-blocks // max(num_rows, 1))), 16), 128), 32
