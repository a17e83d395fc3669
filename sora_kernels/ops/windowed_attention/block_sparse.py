"""Windows as lists of blocks: what libraries for block-sparse attention take.

Such a library runs over the whole pack as one sequence cut into blocks of tokens. For each block of
queries it reads two lists of key blocks, those seen as a whole and those seen in part, and asks a
function of two tokens about the latter; its backward reads the same lists transposed. Segment
boundaries, text, given parts, sinks and causal time are part of the lists and of the function, so
a windowed call is one call without `cu_seqlens`.

Everything is computed on the device of the layout by elementwise arithmetic on its window table and
by two matrix products of small integers, with shapes that the host knows: nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...packing import PackedLayout
    from ...packing.windows import Window

Block = tuple[int, int]
"""Queries and keys of a block."""

ROWS = 11
"""Rows of `token_places`."""


class Lists(NamedTuple):
    """Blocks of the other side that each of R blocks reads, ascending.

    ``partial_count`` and ``full_count`` are int32 `[R]`; ``partial`` and ``full`` int32 `[R, C]`,
    C being the blocks of the other side. Beyond the count a row holds zeros.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor


class BlockTensors(NamedTuple):
    """A window over a pack, as blocks.

    ``places`` is `token_places` up to a whole number of blocks, ``by_query`` lists the key blocks
    of each query block and ``by_key`` the query blocks of each key block. ``turn_partial`` and
    ``turn_full`` lie beside ``by_key.partial`` and ``by_key.full``: how many key blocks before this
    one add to that query block, the order in which a deterministic backward adds up dq.
    """

    places: Tensor
    by_query: Lists
    by_key: Lists
    turn_partial: Tensor
    turn_full: Tensor


def token_places(layout: PackedLayout, window: Window) -> Tensor:
    """Where each token lies as a key, and what it sees as a query: int32 `[ROWS, N]`.

    Rows 0 to 2, as a key: layer, and the tile's h and w. Layers count through the pack: one for the
    tokens of a segment outside its main grid, then one for each tile of the grid along t, so that
    no segment shares a layer with another.
    Rows 3 to 10, as a query: first and end of the layers that it sees as a whole (what is outside
    the main grid and the sink), then of the layers, h and w of its window. See `visible`.
    """
    segment = layout.segment_of_token
    start, t, h, w, a, b, c, _ = layout.window_table().index_select(0, segment).unbind(1)
    a, b, c = a.clamp(min=1), b.clamp(min=1), c.clamp(min=1)
    counts = [(n + size - 1) // size for n, size in ((t, a), (h, b), (w, c))]
    tokens = torch.arange(layout.num_tokens, device=segment.device, dtype=torch.int32)
    place = tokens - layout.cu_seqlens.index_select(0, segment) - start
    main = (place >= 0) & (place < t * h * w)

    # Tile (i, j, k) starts at i*a*h*w + ta*j*b*w + ta*tb*k*c, ta and tb being the extents it has.
    place = place * main
    i = place // (a * h * w).clamp(min=1)
    place = place - i * a * h * w
    ta = torch.minimum(a, t - i * a)
    j = place // (ta * b * w).clamp(min=1)
    place = place - j * ta * b * w
    tb = torch.minimum(b, h - j * b)
    k = place // (ta * tb * c).clamp(min=1)

    back, ahead = window.reach
    spans: list[tuple[Tensor, Tensor]] = []
    for axis, (index, count) in enumerate(zip((i, j, k), counts, strict=True)):
        low = (index - back[axis]).clamp(min=0)
        high = torch.minimum(index + ahead[axis] + 1, count)
        if window.clamped(axis):
            size = back[axis] + ahead[axis] + 1
            low = torch.minimum(low, (count - size).clamp(min=0))
            high = torch.minimum(low + size, count)
        spans.append((low, high))

    table = layout.window_table()
    depth, tile = table[:, 1], table[:, 4].clamp(min=1)
    layers = 1 + (depth + tile - 1) // tile
    base = (torch.cumsum(layers, 0, dtype=torch.int32) - layers).index_select(0, segment)
    sunk = (i + 1 if window.causal else counts[0]).clamp(max=window.sink)
    outside = torch.zeros_like(sunk) if window.causal else counts[0]
    first = base + 1
    return torch.stack(
        [
            base + main * (1 + i), j, k,
            base, first + torch.where(main, sunk, outside),
            first + spans[0][0], first + torch.where(main, spans[0][1], spans[0][0]),
            *spans[1], *spans[2],
        ]
    ).to(torch.int32)  # fmt: skip


def visible(query: Sequence[Tensor] | Tensor, key: Sequence[Tensor] | Tensor) -> Tensor:
    """Whether a query sees a key, from their columns of `token_places`; they broadcast."""
    whole = (key[0] >= query[3]) & (key[0] < query[4])
    layer = (key[0] >= query[5]) & (key[0] < query[6])
    across = (key[1] >= query[7]) & (key[1] < query[8])
    along = (key[2] >= query[9]) & (key[2] < query[10])
    return whole | (layer & across & along)


def block_tensors(layout: PackedLayout, window: Window, block: Block) -> BlockTensors:
    """The window over ``layout`` in blocks of so many queries and keys, cached on the layout.

    Raises:
        ValueError: windows cannot apply to the layout.
        RuntimeError: called for the first time inside a torch.compile region.
    """
    tensors = layout.derived((window, block), partial(_build, window=window, block=block))
    return BlockTensors(tensors[0], Lists(*tensors[1:5]), Lists(*tensors[5:9]), *tensors[9:])


@torch.no_grad()
def _build(layout: PackedLayout, window: Window, block: Block) -> tuple[Tensor, ...]:
    places = token_places(layout, window)
    with torch.autocast(places.device.type, enabled=False):  # bf16 does not hold these integers
        pairs = _visible_pairs(places, layout.num_window_chunks, block)
    sizes = [_block_sizes(layout.num_tokens, size, places.device) for size in block]
    full = pairs == sizes[0][:, None] * sizes[1]
    part = (pairs > 0) & ~full
    by_query = Lists(*_listed(part), *_listed(full))
    by_key = Lists(*_listed(part.mT), *_listed(full.mT))
    turn = torch.cumsum(pairs > 0, 1, dtype=torch.int32).mT - 1
    turns = [turn.gather(1, listed.long()).clamp(min=0) for listed in (by_key.partial, by_key.full)]
    # Kernels ask about tokens up to the end of the last block.
    whole = max(-(-layout.num_tokens // size) * size for size in block)
    padded = torch.nn.functional.pad(places, (0, whole - layout.num_tokens), value=-1)
    return (padded, *by_query, *by_key, *turns)


def _visible_pairs(places: Tensor, num_chunks: int, block: Block) -> Tensor:
    """Pairs (query, key) that see each other in each pair of blocks, `[query blocks, key blocks]`.

    Neighbours with equal places form a chunk: a tile, or tokens outside the main grid. What one
    chunk sees of another is all or nothing, so pairs of blocks are counted from pairs of chunks.
    All numbers are integers that fp32 holds, whatever the order of summation.
    """
    n = places.shape[1]
    changed = (places[:, 1:] != places[:, :-1]).any(0)
    chunk = torch.nn.functional.pad(torch.cumsum(changed, 0), (min(n, 1), 0))
    table = places.new_full((ROWS, num_chunks), -1)
    table[:, chunk] = places  # duplicates write the same values
    sees = visible(table[:, :, None], table[:, None]).float()
    tokens = torch.arange(n, device=places.device)
    query, key = (
        places.new_zeros((-(-n // size), num_chunks), dtype=torch.float32).index_put(
            (tokens // size, chunk), torch.ones((), device=places.device), accumulate=True
        )
        for size in block
    )
    return query @ (sees @ key.mT)


def _block_sizes(n: int, size: int, device: torch.device) -> Tensor:
    """Tokens of each block, float `[blocks]`: the last may be shorter."""
    starts = torch.arange(0, n, size, device=device)
    return (n - starts).clamp(max=size).float()


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 `[R]` and, ascending, the columns of the chosen entries, int32 `[R, C]`."""
    columns = chosen.shape[1]
    numbers = torch.arange(columns, device=chosen.device, dtype=torch.int32)
    listed = torch.where(chosen, numbers, columns).sort(1).values
    return chosen.sum(1, dtype=torch.int32), listed.masked_fill(listed == columns, 0)
