"""Tile windows: the arithmetic of ranges, chunks and work lists against masks by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_kernels.packing import Capacity, Grid, PackedLayout, Text, Window, tile_start
from sora_kernels.packing.windows import (
    WHOLE,
    SegmentGrid,
    Side,
    chunks,
    merged,
    seeing_ranges,
    seeing_tiles,
    seen_ranges,
    seen_tiles,
)
from tests.ops.windowed import layouts, tile_mask, tiles_in_window, windows

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SIDES: tuple[Side, Side] = ("query", "key")


def rule(side: Side) -> Any:
    return seen_ranges if side == "query" else seeing_ranges


# --- one axis -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 12), st.sampled_from([1, 3, 5, 7, 13, None]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_tiles_of_an_axis(count: int, size: int | None, clamp: bool, causal: bool) -> None:
    window = Window((size, 1, 1), "clamp" if clamp else "truncate", causal)
    (back, *_), (ahead, *_) = window.reach
    moved = window.clamped(0)
    sees = []
    for i in range(count):
        low, high = seen_tiles(i, count, back, ahead, moved)
        assert set(range(low, high)) == tiles_in_window(i, count, size, clamp, causal)
        assert low <= i < high
        if moved:
            assert high - low == min(size or count, count)
        sees.append(set(range(low, high)))
    for j in range(count):  # the inverse, which clamping makes asymmetric
        low, high = seeing_tiles(j, count, back, ahead, moved)
        assert set(range(low, high)) == {i for i in range(count) if j in sees[i]}


def test_a_clamped_window_is_not_symmetric() -> None:
    assert seen_tiles(0, 5, 1, 1, True) == (0, 3)
    assert seeing_tiles(0, 5, 1, 1, True) == (0, 2)  # tile 2 does not see tile 0


# --- ranges -------------------------------------------------------------------------------------


@FEW
@given(layouts(), windows())
def test_ranges_are_the_mask(layout: PackedLayout, window: Window) -> None:
    mask = tile_mask(layout, window)
    start = 0
    for grid in layout._host.segment_grids:
        own = mask[start : start + grid.length, start : start + grid.length]
        for side in SIDES:
            table = chunks(grid, window, side).tolist()
            covered = [token for first, stop, *_ in table for token in range(first, stop)]
            assert sorted(covered) == list(range(grid.length))
            for first, stop, number, cost in table:
                ranges = rule(side)(grid, number, window)
                others = [token for a, b in ranges for token in range(a, b)]
                assert len(others) == len(set(others)) == cost
                assert all(b > a for a, b in ranges)
                for token in range(first, stop):
                    seen = own[token] if side == "query" else own[:, token]
                    assert set(others) == set(seen.nonzero()[:, 0].tolist())
        start += grid.length


@FEW
@given(layouts(), windows())
def test_both_sides_count_the_same_pairs(layout: PackedLayout, window: Window) -> None:
    for grid in layout._host.segment_grids:
        pairs = [
            int(((table[:, 1] - table[:, 0]) * table[:, 3]).sum())
            for table in (chunks(grid, window, side) for side in SIDES)
        ]
        assert pairs[0] == pairs[1]
    assert layout.window_pairs(window) == int(tile_mask(layout, window).sum())


def test_few_runs_whatever_the_grid() -> None:
    grid = SegmentGrid(7 + 30 * 48 * 80, 7, (30, 48, 80), (6, 8, 8))
    window = Window((3, 3, 3))
    for number in range(math.prod(grid.counts)):
        for ranges in (seen_ranges(grid, number, window), seeing_ranges(grid, number, window)):
            assert len(ranges) <= 1 + 25  # text, and a run per (t tile, h tile)
        keys = sum(stop - first for first, stop in seen_ranges(grid, number, window))
        assert keys == 7 + 27 * 6 * 8 * 8  # clamping keeps the size


def test_runs_start_where_tiles_do() -> None:
    grid = SegmentGrid(100, 4, (3, 4, 8), (2, 2, 3))
    assert grid.counts == (2, 2, 3)
    for number in range(12):
        index = grid.tile_index(number)
        first, stop = grid.tile_tokens(number)
        assert first == 4 + tile_start(grid.grid, grid.tile, index)
        assert grid.runs(index, (index[0] + 1, index[1] + 1, index[2] + 1)) == [(first, stop)]
    assert merged([(5, 9), (0, 2), (2, 5), (12, 13)]) == [(0, 9), (12, 13)]


# --- work lists ---------------------------------------------------------------------------------


@FEW
@given(layouts(), windows(), st.sampled_from([4, 16, 128]))
def test_work_covers_every_token_once_dearest_first(
    layout: PackedLayout, window: Window, block: int
) -> None:
    for side in SIDES:
        work = layout.window_work(block, window, side)
        assert work.dtype == torch.int32
        assert layout.window_work(block, window, side) is work
        seen: list[tuple[int, int]] = []
        costs = []
        for segment, first, stop, number in work.tolist():
            grid = layout._host.segment_grids[segment]
            if number >= 0:  # one tile
                low, high = grid.tile_tokens(number)
                assert low <= first < stop == high
                assert (first - low) % block == 0
            else:
                assert stop <= grid.start or first >= grid.stop or grid.start == grid.stop
            seen += [(segment, token) for token in range(first, min(first + block, stop))]
            costs.append(sum(b - a for a, b in rule(side)(grid, number, window)))
        assert sorted(seen) == [(s, i) for s, n in enumerate(layout.seqlens) for i in range(n)]
        assert costs == sorted(costs, reverse=True)


PACK = [[Text(3), Grid(2, 4, 6, tile=(1, 2, 2))], [Grid(1, 3, 5, tile=(1, 2, 2)), Text(2)]]


def test_capacity_pads_work_lists_and_copy_updates_them() -> None:
    window = Window((1, 3, 3))
    capacity = Capacity(tokens=96, segments=8, parts=16, max_seqlen=96, blocks=40)
    first, second = (
        PackedLayout(pack, order="tile", capacity=capacity) for pack in (PACK, PACK[::-1])
    )
    table, work = first.window_table(), first.window_work(16, window, "query")
    exact = PackedLayout(PACK, order="tile").window_work(16, window, "query")
    assert work.shape == (40, 4)
    real = [row for row in work.tolist() if row[0] in (0, 1)]
    assert sorted(real) == sorted(exact.tolist())
    assert work[work[:, 0] < 0].tolist() == [[-1, 0, 0, -1]] * int((work[:, 0] < 0).sum())
    want = second.window_table().clone(), second.window_work(16, window, "query")
    assert not torch.equal(table, want[0])
    first.copy_(second)
    assert first.window_table() is table
    assert torch.equal(table, want[0])
    assert first.window_work(16, window, "query") is work
    assert torch.equal(work, want[1])


def test_too_many_blocks_for_the_capacity() -> None:
    capacity = Capacity(tokens=96, segments=8, parts=16, max_seqlen=96, blocks=10)
    layout = PackedLayout(PACK, order="tile", capacity=capacity)
    with pytest.raises(ValueError, match=r"capacity.blocks: the pack has \d+ blocks of 16 tokens"):
        layout.window_work(16, Window((1, 3, 3)), "key")


def test_window_table() -> None:
    table = PackedLayout([*PACK, [Text(4)], []], order="tile").window_table()
    assert table.dtype == torch.int32
    assert table.tolist() == [
        [3, 2, 4, 6, 1, 2, 2, 0], [0, 1, 3, 5, 1, 2, 2, 0], [0] * 8, [0] * 8,
    ]  # fmt: skip


def test_packs_without_a_window() -> None:
    with pytest.raises(ValueError, match='window: expected a layout with order="tile", got'):
        PackedLayout(PACK).window_table()
    two = PackedLayout([PACK[0], [Grid(1, 2, 2), Grid(1, 2, 2)]], order="tile")
    for call in (two.window_table, lambda: two.window_work(16, Window((1, 1, 1)), "query")):
        with pytest.raises(ValueError, match=r"at most one grid to be made .* segments\[1\]"):
            call()


def test_copy_of_a_pack_without_a_window() -> None:
    two = [[Grid(1, 2, 2), Grid(1, 2, 2)]]
    target, source = (PackedLayout(p, order="tile", capacity=96) for p in (PACK, two))
    target.copy_(source)
    with pytest.raises(ValueError, match="at most one grid"):
        target.window_table()


# --- the description ----------------------------------------------------------------------------


@FEW
@given(windows())
def test_integers_hold_a_window(window: Window) -> None:
    ints = window.as_ints()
    assert all(isinstance(n, int) for n in ints)
    assert Window.from_ints(ints) == window
    assert max(ints[:6]) <= WHOLE


def test_window_of_sizes() -> None:
    assert Window.of((3, 3, None)) == Window((3, 3, None)) == Window.of([3, 3, None])
    window = Window((4, 1, 1), causal=True)
    assert Window.of(window) is window


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (r"window\[1\]: expected an odd number of tiles, got 2", lambda: Window((1, 2, 1))),
        (r"window\[0\]: expected an odd number", lambda: Window((2, 1, 1))),
        (r"window\[2\]: expected an integer >= 1, got 0", lambda: Window((1, 1, 0))),
        (r"window\[0\]: expected an integer >= 1, got 3.0", lambda: Window((3.0, 1, 1))),
        (r"window: expected three sizes \(t, h, w\), got \(3, 3\)", lambda: Window((3, 3))),
        ("window: expected three sizes", lambda: Window.of(3)),
        ('edge: expected "clamp" or "truncate", got', lambda: Window((1, 1, 1), "wrap")),
        ("sink: expected an integer >= 0, got -1", lambda: Window((1, 1, 1), sink=-1)),
    ],
)
def test_bad_windows(match: str, make: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make()
