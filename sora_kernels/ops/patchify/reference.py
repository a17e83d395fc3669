"""`patchify` and `unpatchify` in plain PyTorch: the definition that every implementation is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify_reference(video: Tensor, patch: tuple[int, int, int], order: Tensor | None) -> Tensor:
    """`[C, T, H, W]` -> `[tokens, C*pt*ph*pw]`, features ordered (c, pt, ph, pw).

    `order[i]` is the raster number (t, h, w; w fastest) of token i of the pack; None = raster.
    """
    channels, frames, height, width = video.shape
    pt, ph, pw = patch
    blocks = video.reshape(channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    tokens = blocks.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)
    return tokens if order is None else tokens[order]


def unpatchify_reference(
    tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], order: Tensor | None
) -> Tensor:
    """The inverse of `patchify_reference`: `[tokens, C*pt*ph*pw]` -> `[C, T, H, W]`."""
    t, h, w = grid
    pt, ph, pw = patch
    if order is not None:
        tokens = tokens[torch.argsort(order)]
    blocks = tokens.reshape(t, h, w, -1, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2)
