"""Launch configurations of ``qk_norm_rope``: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

from .._tables import Chip, chip_of, tuned

__all__ = ["Config", "backward_steps", "chip_of", "tile"]

# Elements of one tile. 4096 over 4 warps is four 16-byte loads of bf16 in flight per thread.
_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048  # holds x, dy and the weight gradient at once
_ELEMENTS_PER_WARP = {False: 1024, True: 512}  # forward, backward
_BACKWARD_PROGRAMS = 4096  # many waves of any chip, so that the last one, part empty, is short


class Config(NamedTuple):
    """One program works on ``tokens`` x ``heads`` rows of ``2 * pairs`` (padded) components."""

    tokens: int
    heads: int
    pairs: int
    num_warps: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _heads_per_tile(heads: int, most: int) -> int:
    """The largest power of two up to ``most`` that pads the heads by at most 1/8."""
    best = 1
    size = 2
    while size <= most:
        if -(-heads // size) * size <= heads * 1.125:
            best = size
        size *= 2
    return best


def tile(
    heads: int, width: int, across_heads: bool, backward: bool, chip: Chip | None = None
) -> Config:
    """Tile of a launch over ``heads`` (the larger of q's and k's) of ``width`` components.

    All heads of a token share its cos and sin, so a tile prefers heads over tokens. A norm across
    heads needs the whole token in one tile.
    """
    padded = _next_power_of_2(width)
    size = _BACKWARD_TILE if backward else _FORWARD_TILE
    if across_heads:
        block = _next_power_of_2(heads)
    else:
        block = _heads_per_tile(heads, max(1, min(16, size // padded)))
    tokens = max(1, size // (block * padded))
    warps = _next_power_of_2(max(1, block * padded * tokens // _ELEMENTS_PER_WARP[backward]))
    default = Config(tokens, block, padded // 2, min(16, max(4, warps)))
    fields = ("tokens", "num_warps") if across_heads else ("tokens", "heads", "num_warps")
    shape = {"heads": heads, "width": width, "across_heads": across_heads}
    kernel = "backward" if backward else "forward"
    return tuned("qk_norm_rope", kernel, default, fields, chip, **shape)


def backward_steps(num_tokens: int, head_blocks: int, tokens: int) -> int:
    """Tiles that one backward program walks over, summing its weight gradient in registers."""
    tiles = -(-num_tokens // tokens) * head_blocks
    return max(1, min(64, _next_power_of_2(tiles // _BACKWARD_PROGRAMS)))
