"""PackedLayout: offsets, orders, rotary tables, padding, slices."""

from __future__ import annotations

import itertools
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_kernels.ops.patchify import patchify, unpatchify
from sora_kernels.packing import (
    Capacity,
    Grid,
    PackedLayout,
    Text,
    tile_efficiency,
    tile_order,
    tile_shape,
    tile_start,
)

# Latent grids / (1, 2, 2) of Wan 480p, 720p, HunyuanVideo, shorter clips, and images.
REAL_GRIDS = [
    (21, 30, 52),
    (21, 45, 80),
    (30, 48, 80),
    (33, 45, 80),
    (13, 30, 45),
    (16, 28, 48),
    (5, 15, 26),
    (61, 18, 32),
    (1, 64, 64),
    (1, 48, 80),
    (1, 30, 52),
    (1, 45, 80),
    (1, 32, 32),
    (1, 128, 128),
]

sizes = st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
parts = st.one_of(st.integers(0, 9).map(Text), sizes.map(lambda size: Grid(*size)))
packs = st.lists(st.lists(parts, max_size=3), max_size=4)
quick = settings(max_examples=40, deadline=None)


def mixed(order="raster", **kwargs) -> PackedLayout:
    segments = [
        [Text(7), Grid(3, 10, 13)],
        [Text(0), Grid(1, 20, 22, origin=(0.5, 0, 0), scale=(1, 0.5, 2))],
        [],
        [Grid(1, 6, 8, given=True), Grid(4, 6, 8, origin=(1, 0, 0)), Text(5)],
    ]
    return PackedLayout(segments, order=order, device="cpu", **kwargs)


def plain_tile_order(grid, tile) -> list[int]:
    """Tile order by sorting: tile numbers first, then raster order."""
    tokens = list(itertools.product(*map(range, grid)))
    tokens.sort(key=lambda p: [x // s for x, s in zip(p, tile, strict=True)])
    return [(t * grid[1] + h) * grid[2] + w for t, h, w in tokens]


@quick
@given(packs, st.sampled_from(["raster", "tile"]))
def test_offsets_and_maps_agree_with_a_walk_over_the_parts(segments, order):
    layout = PackedLayout(segments, order=order, device="cpu")
    segment_of, part_of, is_grid, ends, part = [], [], [], [0], 0
    for s, segment in enumerate(segments):
        for item in segment:
            segment_of += [s] * item.num_tokens
            part_of += [part] * item.num_tokens
            is_grid += [isinstance(item, Grid)] * item.num_tokens
            part += 1
        ends.append(len(segment_of))
    assert layout.num_tokens == len(segment_of)
    assert (layout.num_segments, layout.num_parts) == (len(segments), part)
    assert layout.cu_seqlens.tolist() == ends and layout.cu_seqlens.dtype == torch.int32
    assert layout.segment_of_token.tolist() == segment_of
    assert layout.part_of_token.tolist() == part_of
    assert layout.seqlens == [b - a for a, b in itertools.pairwise(ends)]
    assert layout.max_seqlen == max(layout.seqlens, default=0)
    assert layout.grid_tokens.tolist() == [i for i, grid in enumerate(is_grid) if grid]
    assert layout.text_tokens.tolist() == [i for i, grid in enumerate(is_grid) if not grid]
    assert layout.grid_tokens.dtype == layout.text_tokens.dtype == torch.int64
    assert layout.counts.tolist() == [len(segment_of), len(segments), part]
    for rows, index in ((layout.segment_rows, segment_of), (layout.part_rows, part_of)):
        assert rows.index.tolist() == index and rows.order is None
        assert rows.num_tokens == layout.num_tokens
        for row in range(rows.num_rows):
            start, stop = rows.offsets[row : row + 2].tolist()
            assert index[start:stop] == [row] * index.count(row)


@quick
@given(sizes, st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
def test_tile_order_is_the_permutation_that_sorting_gives(grid, tile):
    tile = tuple(min(n, s) for n, s in zip(grid, tile, strict=True))
    order = tile_order(grid, tile)
    assert order.tolist() == plain_tile_order(grid, tile)
    tiles = [range(-(-n // s)) for n, s in zip(grid, tile, strict=True)]
    for index in itertools.product(*tiles):
        corner = [i * s for i, s in zip(index, tile, strict=True)]
        raster = (corner[0] * grid[1] + corner[1]) * grid[2] + corner[2]
        assert order[tile_start(grid, tile, index)] == raster


@quick
@given(packs)
def test_tile_order_moves_tokens_and_keeps_their_coordinates(segments):
    raster = PackedLayout(segments, device="cpu")
    tiled = PackedLayout(segments, order="tile", device="cpu")
    assert raster.raster_of_token is None
    places = tiled.raster_of_token
    assert sorted(places.tolist()) == list(range(tiled.num_tokens))
    assert torch.equal(tiled.coordinates(), raster.coordinates()[places])
    assert torch.equal(tiled.part_of_token, raster.part_of_token[places])
    for a, b in zip(tiled.rope((2, 4, 6)).dense(), raster.rope((2, 4, 6)).dense(), strict=True):
        assert torch.equal(a, b[places])


def test_patchify_stores_tiles_and_brings_them_back():
    raster, tiled = mixed(patch=(1, 2, 2)), mixed("tile", patch=(1, 2, 2))
    grids = [part for part in tiled.parts if isinstance(part, Grid)]
    videos = [torch.randn(3, g.t, 2 * g.h, 2 * g.w) for g in grids]
    tokens = patchify(videos, tiled)
    packed = torch.zeros(raster.num_tokens, tokens.shape[1])
    packed[raster.grid_tokens] = patchify(videos, raster)
    assert torch.equal(tokens, packed[tiled.raster_of_token][tiled.grid_tokens])
    for video, again in zip(videos, unpatchify(tokens, tiled, 3), strict=True):
        assert torch.equal(video, again)


def test_tiles_adjacent_along_w_are_one_run():
    grid, tile = (7, 11, 13), (3, 4, 5)
    for i, j in itertools.product(range(3), range(3)):
        ends = [tile_start(grid, tile, (i, j, k)) for k in range(3)]
        extent = min(3, 7 - 3 * i) * min(4, 11 - 4 * j)
        assert [b - a for a, b in itertools.pairwise(ends)] == [extent * 5, extent * 5]
        following = (i, j + 1, 0) if j < 2 else (i + 1, 0, 0)
        if following[0] < 3:
            assert tile_start(grid, tile, following) == ends[-1] + extent * 3


@pytest.mark.parametrize("grid", REAL_GRIDS, ids=str)
def test_block_efficiency_of_real_grids(grid):
    layout = PackedLayout([[Grid(*grid)]], order="tile", device="cpu")
    tile = layout.tile_of(Grid(*grid))
    # Counted tile by tile, to check the closed form.
    rows = [
        [min(s, n - start) for start in range(0, n, s)] for n, s in zip(grid, tile, strict=True)
    ]
    blocks = sum(-(-a * b * c // 128) for a, b, c in itertools.product(*rows))
    assert layout.block_efficiency == pytest.approx(math.prod(grid) / (128 * blocks))
    assert layout.block_efficiency >= 0.85
    assert layout.part_table[0].tolist() == [0, math.prod(grid), *grid, *tile]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(16, 90), st.integers(16, 120))
def test_block_efficiency_of_any_grid_of_a_thousand_tokens(t, h, w):
    tile = tile_shape(t, h, w)
    assert all(1 <= s <= n for s, n in zip(tile, (t, h, w), strict=True))
    if t * h * w >= 1000:
        assert tile_efficiency((t, h, w), tile) >= 0.85


def test_known_tiles():
    assert tile_shape(30, 48, 80) == (6, 8, 8)
    assert tile_shape(1, 64, 64) == (1, 16, 16)
    assert tile_shape(2, 5, 7) == (2, 5, 7)
    layout = PackedLayout(
        [[Grid(9, 9, 9), Grid(9, 9, 9, tile=(1, 2, 99))]],
        order="tile",
        tile=(4, 4, 4),
        device="cpu",
    )
    assert layout.part_table[:, 5:].tolist() == [[4, 4, 4], [1, 2, 9]]


def test_from_grids():
    layout = PackedLayout.from_grids(
        [(5, 30, 52), (1, 64, 64)], patch=(1, 2, 2), text_lengths=[3, 0], device="cpu"
    )
    assert layout.segments == ((Text(3), Grid(5, 15, 26)), (Text(0), Grid(1, 32, 32)))
    assert layout.seqlens == [1953, 1024] and layout.patch == (1, 2, 2)
    assert (layout.num_grid_tokens, layout.num_text_tokens) == (2974, 3)
    bare = PackedLayout.from_grids([(5, 30, 52)], device="cpu")
    assert bare.segments == ((Grid(5, 15, 26),),)


def test_work_list_covers_every_block_longest_first():
    layout = mixed()
    work = layout.work(64)
    assert work.dtype == torch.int32 and layout.work(64) is work
    lengths = [layout.seqlens[s] for s, _ in work.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    expected = {(s, b) for s, n in enumerate(layout.seqlens) for b in range(-(-n // 64))}
    assert set(map(tuple, work.tolist())) == expected and len(work) == len(expected)


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_capacity_pads_the_launch_and_keeps_the_counts(order):
    bare = mixed(order)
    capacity = Capacity(2000, segments=9, parts=20, max_seqlen=600)
    layout = mixed(order, capacity=capacity)
    real = bare.num_tokens
    assert (layout.num_tokens, layout.num_segments, layout.num_parts) == (2000, 9, 20)
    assert layout.max_seqlen == 600 and max(layout.seqlens) <= 600 and sum(layout.seqlens) == 2000
    assert layout.counts.tolist() == [real, 4, 7] and layout.segments == bare.segments
    assert torch.equal(layout.grid_tokens, bare.grid_tokens)
    assert torch.equal(layout.text_tokens, bare.text_tokens)
    assert torch.equal(layout.segment_of_token[:real], bare.segment_of_token)
    assert layout.block_efficiency == bare.block_efficiency
    rope = layout.rope((4, 4, 4))
    assert rope.cos.shape == (1024, 6)
    assert torch.equal(rope.dense()[0][:real], bare.rope((4, 4, 4)).dense()[0])
    work = layout.work(128).tolist()
    inside = [(s, b) for s, b in work if b * 128 < layout.seqlens[s]]
    expected = {(s, b) for s, n in enumerate(layout.seqlens) for b in range(-(-n // 128))}
    assert len(inside) == len(expected) and set(inside) == expected


def test_copy_replaces_the_pack_in_place():
    capacity = Capacity(2000, max_seqlen=700)
    layout = mixed("tile", capacity=capacity)
    rope, work = layout.rope((4, 4, 4)), layout.work(128)
    tensors = [layout.cu_seqlens, layout.segment_of_token, rope.cos, rope.position_index, work]
    pointers = [t.data_ptr() for t in tensors]
    other = PackedLayout(
        [[Text(3), Grid(2, 9, 9)], [Grid(5, 10, 10, origin=(7, 0, 0))]],
        order="tile",
        device="cpu",
        capacity=capacity,
    )
    assert layout.copy_(other) is layout
    assert pointers == [t.data_ptr() for t in tensors]
    assert layout.segments == other.segments and layout.seqlens == other.seqlens
    for name in (
        "cu_seqlens",
        "segment_of_token",
        "part_of_token",
        "part_table",
        "counts",
        "grid_tokens",
        "text_tokens",
        "raster_of_token",
    ):
        assert torch.equal(getattr(layout, name), getattr(other, name)), name
    assert torch.equal(layout.segment_rows.index, other.segment_rows.index)
    assert torch.equal(rope.cos, other.rope((4, 4, 4)).cos)
    assert torch.equal(rope.position_index, other.rope((4, 4, 4)).position_index)
    assert torch.equal(work, other.work(128))
    with pytest.raises(ValueError, match="copy_: expected two layouts with a capacity"):
        layout.copy_(mixed("tile"))
    with pytest.raises(ValueError, match="copy_: expected capacity"):
        layout.copy_(mixed("tile", capacity=2048))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_partition_the_pack(world):
    layout = mixed("tile")
    shards = [layout.shard(rank, world) for rank in range(world)]
    assert sum(shard.num_tokens for shard in shards) == layout.num_tokens
    x = torch.arange(layout.num_tokens)
    assert torch.equal(torch.cat([shard.take(x) for shard in shards]), x)
    index = torch.cat([shard.segment_rows.index for shard in shards])
    assert torch.equal(index, layout.segment_of_token)
    cos = torch.cat([shard.rope((4, 4, 4)).dense()[0] for shard in shards])
    assert torch.equal(cos, layout.rope((4, 4, 4)).dense()[0])
    for shard in shards:
        for rows in (shard.segment_rows, shard.part_rows):
            counts = torch.bincount(rows.index, minlength=rows.num_rows)
            assert torch.equal(rows.offsets.diff().long(), counts)
            assert rows.num_tokens == shard.num_tokens


def test_layout_is_an_argument_of_a_compiled_function():
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def use(layout, x):
        rope = layout.rope((2, 4, 4))
        rows = layout.segment_rows
        y = x * layout.segment_of_token[:, None] + rope.cos[rope.position_index[:, 0].long()].sum()
        return y.index_select(0, layout.grid_tokens) * layout.max_seqlen + rows.num_rows

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, backend=count)
    for n in range(2, 8):
        layout = PackedLayout.from_grids(
            [(1 + i, 8, 2 * i + 6) for i in range(n)],
            text_lengths=range(n),
            order="tile",
            device="cpu",
        )
        layout.rope((2, 4, 4))
        x = torch.randn(layout.num_tokens, 3)
        assert torch.equal(compiled(layout, x), use(layout, x))
    assert graphs <= 3  # first static, then dynamic; not one per pack


def test_copies_and_pickles():
    layout = mixed("tile")
    layout.rope((4, 4, 4))
    again = pickle.loads(pickle.dumps(layout))
    assert torch.equal(again.raster_of_token, layout.raster_of_token)
    assert torch.equal(again.part_rows.offsets, layout.part_rows.offsets)
    assert layout.to("cpu") is layout
    meta = layout.to("meta")
    assert meta.cu_seqlens.is_meta and meta.cu_seqlens.shape == layout.cu_seqlens.shape
    assert meta.segment_rows.index.is_meta and meta.rope((4, 4, 4)).cos.is_meta
    assert not layout.cu_seqlens.is_meta


BAD_INPUT = [
    (lambda: Text(-1), "Text.length: expected an integer >= 0, got -1"),
    (lambda: Text(True), "Text.length: expected an integer >= 0, got True"),
    (lambda: Grid(0, 2, 2), "Grid.t: expected an integer >= 1, got 0"),
    (lambda: Grid(1, 2, float("nan")), "Grid.w: expected an integer >= 1, got nan"),
    (lambda: Grid(1, 2, 2, scale=(1, 1, float("inf"))), "Grid.scale: expected three finite"),
    (lambda: Grid(1, 2, 2, tile=(1, 2)), "Grid.tile: expected three integers"),
    (lambda: PackedLayout([], order="zigzag"), 'order: expected "raster" or "tile", got'),
    (lambda: PackedLayout([], patch=(1, 2)), "patch: expected three integers"),
    (lambda: PackedLayout([], tile=(1, 2, 2)), "tile: expected None with order='raster'"),
    (lambda: PackedLayout([[Text(2**31)]]), "segments: expected at most 2147483647 tokens"),
    (lambda: PackedLayout([[Text(9)]], capacity=8), "capacity.tokens: the pack has 9 tokens"),
    (
        lambda: PackedLayout([[Text(1)]], capacity=Capacity(8, segments=1)),
        "capacity.segments: expected one more than the segments of the pack (1), got 1",
    ),
    (
        lambda: PackedLayout([[Text(4)]], capacity=Capacity(8, max_seqlen=3)),
        "capacity.max_seqlen: a segment has 4 tokens, more than 3",
    ),
    (
        lambda: PackedLayout([], capacity=Capacity(90, 2, max_seqlen=20)),
        "capacity.max_seqlen: 90 padding tokens do not fit into 2 free segments",
    ),
    (
        lambda: PackedLayout([[Text(0)] * 9], capacity=Capacity(8, 2, 9)),
        "capacity.parts: the pack has 9 parts and 1 padding segments, more than 9",
    ),
    (
        lambda: mixed(capacity=Capacity(2000, positions=4)).rope((2, 2, 2)),
        "positions in its tables, more than 4",
    ),
    (
        lambda: PackedLayout.from_grids([(1, 3, 4)]),
        "latent_grids[0]: expected multiples of (1, 2, 2), got (1, 3, 4)",
    ),
    (
        lambda: PackedLayout.from_grids([(1, 2, 4)], text_lengths=[1, 2]),
        "text_lengths: expected 1 lengths, one per grid, got 2",
    ),
    (lambda: mixed().rope((2, 3, 4)), "axes: expected even sizes with a positive sum, got (2, 3"),
    (lambda: mixed().rope((2, 4)), "axes: expected three even sizes (t, h, w), got (2, 4)"),
    (lambda: mixed().rope((2, 2, 2), theta=-1.0), "theta: expected a positive number"),
    (lambda: mixed().rope((2, 2, 2), ntk=(1.0, 2.0)), "ntk: expected a positive number"),
    (
        lambda: mixed().rope((2, 2, 2), frequencies=[[1.0], [1.0], []]),
        "frequencies: expected three sequences of [1, 1, 1] finite numbers",
    ),
    (lambda: mixed().work(0), "block: expected an integer >= 1, got 0"),
    (lambda: mixed().shard(2, 2), "rank: expected less than world (2), got 2"),
    (lambda: mixed().shard(0, 2).take(torch.zeros(3)), "tokens: expected 1082 rows, got (3,)"),
]


@pytest.mark.parametrize(("make", "message"), BAD_INPUT)
def test_bad_values_name_the_argument(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_bad_parts_name_the_place():
    with pytest.raises(TypeError, match=r"segments\[0\]: expected a list of parts, got Text"):
        PackedLayout([Text(3)])
    with pytest.raises(TypeError, match=r"segments\[1\]\[0\]: expected Text or Grid, got 7"):
        PackedLayout([[], [7]])
