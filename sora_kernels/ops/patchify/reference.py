"""`patchify` and `unpatchify` in plain PyTorch: what every implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def raster_order(
    grid: Sequence[int], tile: Sequence[int], device: torch.device | str
) -> Tensor | None:
    """Raster number (t, h, w; w fastest) of each stored token; None if they are the same.

    Tiles follow each other in raster order, and so do the tokens within a tile.
    """
    if tuple(grid) == tuple(tile):
        return None
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(*grid)
    starts = (range(0, n, size) for n, size in zip(grid, tile, strict=True))
    blocks = (
        numbers[t : t + tile[0], h : h + tile[1], w : w + tile[2]] for t, h, w in product(*starts)
    )
    return torch.cat([block.flatten() for block in blocks]).to(device)


def patchify_reference(video: Tensor, patch: Sequence[int], order: Tensor | None) -> Tensor:
    """`[C, T, H, W]` -> `[tokens, C*pt*ph*pw]`, features ordered (c, pt, ph, pw)."""
    channels, frames, height, width = video.shape
    pt, ph, pw = patch
    blocks = video.reshape(channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    tokens = blocks.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)
    return tokens if order is None else tokens[order]


def unpatchify_reference(
    tokens: Tensor, grid: Sequence[int], patch: Sequence[int], order: Tensor | None
) -> Tensor:
    """The inverse of `patchify_reference`: `[tokens, C*pt*ph*pw]` -> `[C, T, H, W]`."""
    t, h, w = grid
    pt, ph, pw = patch
    if order is not None:
        tokens = tokens[torch.argsort(order)]
    blocks = tokens.reshape(t, h, w, -1, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2)
