"""What the tests of tile windows share: random packs and windows, and masks by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import backend, packed_attention
from sora_kernels.packing import Grid, PackedLayout, Part, Text, Window

VIDEO = [Text(5), Grid(3, 5, 7, tile=(1, 2, 2))]
GIVEN = [Text(2), Grid(1, 2, 3, given=True), Grid(4, 4, 4, tile=(2, 2, 1)), Text(0), Text(3)]
IMAGE = [Grid(1, 9, 8, tile=(1, 3, 4))]


def tiles_in_window(i: int, count: int, size: int | None, clamp: bool, causal: bool) -> set[int]:
    """The tiles of an axis that tile `i` sees, from the words of the definition."""
    if size is None:
        return {j for j in range(count) if j <= i or not causal}
    if causal:
        return {j for j in range(count) if 0 <= i - j < size}
    if not clamp:
        return {j for j in range(count) if abs(i - j) <= size // 2}
    if size >= count:
        return set(range(count))
    # Of all windows of full size inside the grid, the one whose middle is nearest to the tile.
    start = min(range(count - size + 1), key=lambda start: abs(start + size // 2 - i))
    return set(range(start, start + size))


def main_grid(segment: tuple[Part, ...]) -> Grid | None:
    for part in segment:
        if isinstance(part, Grid) and not part.given:
            return part
    return None


def segment_mask(layout: PackedLayout, segment: tuple[Part, ...], window: Window) -> Tensor:
    """bool `[L, L]`, query by key, of the tokens of a segment in raster order."""
    labels: list[Any] = []  # None outside the main grid, else (t, h, w) of the tile
    counts = (0, 0, 0)
    for part in segment:
        if isinstance(part, Text) or part.given:
            labels += [None] * part.num_tokens
            continue
        tile, size = layout.tile_of(part), (part.t, part.h, part.w)
        starts = [list(range(0, n, step)) for n, step in zip(size, tile, strict=True)]
        counts = (len(starts[0]), len(starts[1]), len(starts[2]))
        for token in itertools.product(*map(range, size)):
            labels.append(tuple(x // step for x, step in zip(token, tile, strict=True)))
    seen_by: dict[Any, set[Any]] = {}
    for label in dict.fromkeys(labels):
        if label is None:
            continue
        axes = [
            tiles_in_window(
                label[a], counts[a], window.size[a], window.edge == "clamp",
                window.causal and a == 0,
            )
            for a in range(3)
        ]  # fmt: skip
        tiles = set(itertools.product(*axes))
        for sunk in itertools.product(*map(range, (min(window.sink, counts[0]), *counts[1:]))):
            if not window.causal or sunk[0] <= label[0]:
                tiles.add(sunk)
        seen_by[label] = tiles
    time_flows = window.causal and any(label is not None for label in labels)
    rows = []
    for query in labels:
        if query is None:
            rows.append([key is None or not time_flows for key in labels])
        else:
            rows.append([key is None or key in seen_by[query] for key in labels])
    return torch.tensor(rows, dtype=torch.bool).reshape(len(labels), len(labels))


def raster_mask(layout: PackedLayout, window: Window) -> Tensor:
    """bool `[N, N]` of the whole pack, in raster order."""
    masks = [segment_mask(layout, segment, window) for segment in layout.segments]
    return torch.block_diag(*masks).bool() if masks else torch.zeros(0, 0, dtype=torch.bool)


def tile_mask(layout: PackedLayout, window: Window) -> Tensor:
    """The same mask with tokens as the layout stores them."""
    places = layout.raster_of_token
    assert places is not None
    return raster_mask(layout, window)[places][:, places]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[N, H, D]` and lse `[H, N]` under one explicit mask, in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1), v.repeat_interleave(group, 1))
    return out, torch.logsumexp(scores, -1)


# --- random packs and windows -------------------------------------------------------------------


@st.composite
def segments(draw: Any) -> list[Part]:
    """Text, given grids and at most one grid to be made, in any order and with any tile."""
    parts: list[Part] = []
    if draw(st.booleans()):
        parts.append(Text(draw(st.integers(0, 5))))
    if draw(st.booleans()):
        parts.append(Grid(1, draw(st.integers(1, 3)), draw(st.integers(1, 3)), given=True))
    if draw(st.integers(0, 4)):
        size = [draw(st.integers(1, n)) for n in (5, 6, 6)]
        tile = tuple(draw(st.integers(1, 3)) for _ in range(3))
        parts.insert(draw(st.integers(0, len(parts))), Grid(*size, tile=tile))
    return parts


@st.composite
def windows(draw: Any) -> Window:
    causal = draw(st.booleans())
    odd = st.sampled_from([None, 1, 3, 5])
    first = draw(st.sampled_from([None, 1, 2, 3, 4])) if causal else draw(odd)
    edge = draw(st.sampled_from(["clamp", "truncate"]))
    return Window((first, draw(odd), draw(odd)), edge, causal, draw(st.integers(0, 2)))


def layouts() -> st.SearchStrategy[PackedLayout]:
    packs = st.lists(segments(), min_size=1, max_size=3)
    return packs.map(lambda pack: PackedLayout(pack, order="tile"))


def attention(layout: PackedLayout, window: Any, chosen: str) -> Any:
    """q, k, v -> out, lse by a chosen implementation."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with backend.use_backend(chosen):
            return packed_attention(q, k, v, layout, window=window, return_lse=True)

    return call
