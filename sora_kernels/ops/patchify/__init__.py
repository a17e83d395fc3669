"""Videos of different sizes <-> one packed token matrix: `patchify` and `unpatchify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference import patchify_reference, unpatchify_reference

if TYPE_CHECKING:
    from ...packing import PackedLayout

__all__ = ["patchify", "patchify_reference", "unpatchify", "unpatchify_reference"]


def patchify(videos: Sequence[Tensor], layout: PackedLayout) -> Tensor:
    """Cut videos into spacetime patches, in the token order of the layout.

    Args:
        videos: one `[C, T, H, W]` per grid part of the layout, in packed order; T, H, W must be
            exactly the part's grid times the patch (pad the video first: nothing is padded here).
        layout: the pack; its `patch` is (pt, ph, pw).

    Returns:
        `[Ng, C*pt*ph*pw]`, Ng = the number of grid tokens, features ordered (c, pt, ph, pw).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    grids = _grids(layout)
    _check_videos(videos, grids, layout.patch)
    if not videos:
        raise ValueError("patchify: videos expected at least one, got none")
    return torch.cat([patchify_reference(x, layout.patch, None) for x in videos])


def unpatchify(tokens: Tensor, layout: PackedLayout, channels: int) -> list[Tensor]:
    """The inverse of `patchify`: `[Ng, C*pt*ph*pw]` -> one `[C, T, H, W]` per grid part.

    Args:
        tokens: grid tokens in packed order, features ordered (c, pt, ph, pw); rows may be strided.
        layout: the pack.
        channels: C.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    grids = _grids(layout)
    pt, ph, pw = layout.patch
    expected = (sum(t * h * w for t, h, w in grids), channels * pt * ph * pw)
    if tuple(tokens.shape) != expected:
        raise ValueError(f"unpatchify: tokens expected {expected}, got {tuple(tokens.shape)}")
    pieces = tokens.split([t * h * w for t, h, w in grids])
    return [
        unpatchify_reference(x, grid, layout.patch, None)
        for x, grid in zip(pieces, grids, strict=True)
    ]


def _grids(layout: PackedLayout) -> list[tuple[int, int, int]]:
    from ...packing import Grid

    parts = [part for segment in layout.segments for part in segment]
    return [(p.t, p.h, p.w) for p in parts if isinstance(p, Grid)]


def _check_videos(
    videos: Sequence[Tensor], grids: list[tuple[int, int, int]], patch: tuple[int, int, int]
) -> None:
    if len(videos) != len(grids):
        raise ValueError(f"patchify: videos expected {len(grids)}, got {len(videos)}")
    for i, (x, grid) in enumerate(zip(videos, grids, strict=True)):
        size = tuple(g * p for g, p in zip(grid, patch, strict=True))
        if x.dim() != 4 or tuple(x.shape[1:]) != size:
            raise ValueError(
                f"patchify: videos[{i}] expected [C, {size[0]}, {size[1]}, {size[2]}] "
                f"(grid {grid} x patch {patch}), got {tuple(x.shape)}"
            )
        first = videos[0]
        if x.shape[0] != first.shape[0] or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"patchify: videos[{i}] expected {first.shape[0]} channels of {first.dtype} on "
                f"{first.device} as videos[0], got {x.shape[0]} of {x.dtype} on {x.device}"
            )
