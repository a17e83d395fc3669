"""Windowed attention in plain PyTorch: the definition that every implementation is held to.

The masks are made from the coordinates of the tokens, not from ranges of tokens, so that an error
in the arithmetic of `packing.windows` cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...packing.parts import Grid, Part

if TYPE_CHECKING:
    from ...packing import PackedLayout
    from ...packing.windows import Window


def windowed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: Window, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention under `window` inside each segment; returns `out [N, H, D]` and `lse [H, N]`.

    Scores and softmax are at least fp32; probabilities are rounded to the dtype of `v` before they
    meet it, as every tensor-core attention does. Differentiable, in any float dtype.
    """
    heads = q.shape[1]
    groups = heads // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    coordinates = layout.coordinates().long().to(q.device)
    lengths = layout.seqlens
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for number, (q_seg, k_seg, v_seg, places) in enumerate(
        zip(*(x.split(lengths) for x in (q, k, v, coordinates)), strict=True)
    ):
        segment = layout.segments[number] if number < len(layout.segments) else ()
        seen = segment_mask(places, segment, layout, window)
        q_h = q_seg.transpose(0, 1).to(wide)
        k_h = k_seg.transpose(0, 1).repeat_interleave(groups, 0).to(wide)
        v_h = v_seg.transpose(0, 1).repeat_interleave(groups, 0)
        scores = (q_h @ k_h.mT * softmax_scale).masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, -1)
        probabilities = torch.exp(scores - lse[..., None]).to(v.dtype)
        outs.append((probabilities.to(wide) @ v_h.to(wide)).to(q.dtype).transpose(0, 1))
        lses.append(lse)
    if not outs:
        return q.clone(), q.new_zeros((heads, 0), dtype=wide)
    return torch.cat(outs), torch.cat(lses, 1)


def segment_mask(
    coordinates: Tensor, segment: Sequence[Part], layout: PackedLayout, window: Window
) -> Tensor:
    """bool `[L, L]`: which key (column) each query (row) of a segment sees.

    Args:
        coordinates: int64 `[L, 3]`, (t, h, w) of each token within its part, as stored.
        segment: its parts; () for padding. Every token of a segment without a grid to be made sees
            every other.
    """
    length = coordinates.shape[0]
    main = torch.zeros(length, dtype=torch.bool, device=coordinates.device)
    grid: Grid | None = None
    start = 0
    for part in segment:
        if isinstance(part, Grid) and not part.given:
            grid = part
            main[start : start + part.num_tokens] = True
        start += part.num_tokens
    if grid is None:
        return torch.ones(length, length, dtype=torch.bool, device=coordinates.device)
    size = (grid.t, grid.h, grid.w)
    tile = layout.tile_of(grid)
    tiles = coordinates // torch.tensor(tile, device=coordinates.device)
    near = main[:, None] & main
    for axis in range(3):
        query, key = tiles[:, axis, None], tiles[None, :, axis]
        count = (size[axis] + tile[axis] - 1) // tile[axis]
        near &= _within(query, key, count, window, axis)
    if window.sink:
        query, key = tiles[:, 0, None], tiles[None, :, 0]
        sunk = main[:, None] & main & (key < window.sink)
        near |= sunk & (key <= query) if window.causal else sunk
    if window.causal:  # else the future would reach a token through those outside the grid
        return near | ~main
    return near | ~main | ~main[:, None]


def _within(query: Tensor, key: Tensor, count: int, window: Window, axis: int) -> Tensor:
    """Whether tile `key` of an axis of `count` tiles is in the window of tile `query`."""
    size = window.size[axis]
    if window.causal and axis == 0:
        past = key <= query
        return past if size is None else past & (query - key < size)
    if size is None:
        return torch.ones_like(query == key)
    if window.edge == "truncate":
        return (query - key).abs() <= size // 2
    first = (query - size // 2).clamp(0, max(count - size, 0))
    return (first <= key) & (key < first + size)
