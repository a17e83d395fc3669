"""3-D sliding tile windows: which tokens of a segment a tile of it sees, and which see it.

A window counts tiles of a tile-ordered grid (`tiles`), as sliding tile attention does (STA, arXiv
2502.04507), so that all queries of a tile see the same keys and no element mask is needed. At the
borders a window is moved inwards and keeps its size (NATTEN, arXiv 2204.07143) unless it is told
to be cut off. Tiles that are adjacent along w are contiguous, so the keys of a tile are a few
ranges of tokens: at most one per (t tile, h tile) of the window, plus the segment's other parts.

A segment has at most one *main* grid, the one that is not `given`; windows apply to it alone. Its
other tokens (text, given frames) are seen by everything in the segment and see everything, except
in causal time: there they see each other only, or the future would come back through them.

What a kernel does by integer arithmetic is written here once more in plain Python, for the CPU
implementation, the work lists and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .parts import Triple, as_int
from .tiles import tile_start

Edge = Literal["clamp", "truncate"]
TokenRange: TypeAlias = tuple[int, int]
"""First token and end, counted from the first token of the segment."""

WHOLE = 1 << 20
"""Reach of a window over a whole axis: more tiles than any axis has."""


@dataclass(frozen=True)
class Window:
    """A 3-D window in tiles.

    Attributes:
        size: tiles seen along (t, h, w), odd (t of a causal window: any); None = the whole axis.
        edge: "clamp" moves a window that would leave the grid inwards, so that every query sees the
            same number of tiles; "truncate" cuts it off.
        causal: block-causal in time: `size[0]` counts the own layer of tiles and those before it.
            With tiles of one frame it is causal frame by frame. Never clamped along t.
        sink: first layers of tiles along t that every query sees as a whole, whatever its window
            (streaming: the first frames stay in view).
    """

    size: tuple[int | None, int | None, int | None]
    edge: Edge = "clamp"
    causal: bool = False
    sink: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, Sequence) or len(self.size) != 3:
            raise ValueError(f"window: expected three sizes (t, h, w), got {self.size!r}")
        sizes = []
        for axis, size in enumerate(self.size):
            if size is not None:
                size = as_int(f"window[{axis}]", size, 1)
                if size % 2 == 0 and not (self.causal and axis == 0):
                    raise ValueError(f"window[{axis}]: expected an odd number of tiles, got {size}")
            sizes.append(size)
        object.__setattr__(self, "size", tuple(sizes))
        if self.edge not in ("clamp", "truncate"):
            raise ValueError(f'edge: expected "clamp" or "truncate", got {self.edge!r}')
        object.__setattr__(self, "sink", as_int("sink", self.sink, 0))

    @staticmethod
    def of(value: Any) -> Window:
        """A `Window`, or three sizes, as a `Window`."""
        return value if isinstance(value, Window) else Window(value)

    @property
    def reach(self) -> tuple[Triple, Triple]:
        """Tiles (before, after) the own one that the window covers, per axis."""
        back, ahead = [], []
        for axis, size in enumerate(self.size):
            causal = self.causal and axis == 0
            half = WHOLE if size is None else size - 1 if causal else size // 2
            back.append(half)
            ahead.append(0 if causal else half)
        return (back[0], back[1], back[2]), (ahead[0], ahead[1], ahead[2])

    def as_ints(self) -> tuple[int, ...]:
        """What the raw ops take: tiles before and after per axis, clamp, causal, sink."""
        back, ahead = self.reach
        return (*back, *ahead, int(self.edge == "clamp"), int(self.causal), self.sink)

    @staticmethod
    def from_ints(values: Sequence[int]) -> Window:
        """The inverse of `as_ints`."""
        sizes = [
            None if back == WHOLE else back + ahead + 1
            for back, ahead in zip(values[:3], values[3:6], strict=True)
        ]
        edge: Edge = "clamp" if values[6] else "truncate"
        return Window((sizes[0], sizes[1], sizes[2]), edge, bool(values[7]), values[8])

    def clamped(self, axis: int) -> bool:
        return self.edge == "clamp" and not (self.causal and axis == 0)


def seen_tiles(index: int, count: int, back: int, ahead: int, clamp: bool) -> tuple[int, int]:
    """Tiles `[low, high)` of an axis of `count` tiles that tile `index` sees."""
    low, high = max(index - back, 0), min(index + ahead + 1, count)
    if clamp:
        size = back + ahead + 1
        low = min(low, max(count - size, 0))
        high = min(low + size, count)
    return low, high


def seeing_tiles(index: int, count: int, back: int, ahead: int, clamp: bool) -> tuple[int, int]:
    """Tiles `[low, high)` that see tile `index`: the inverse of `seen_tiles`.

    Clamped windows of size s start at min(max(i - back, 0), n - s). A tile p < s is within the
    window at 0, so the first tiles see it; one p >= n - s is within the window at n - s, so the
    last tiles do. Between, tile i sees p iff i - back <= p <= i + ahead.
    """
    low, high = max(index - ahead, 0), min(index + back + 1, count)
    if clamp:
        size = back + ahead + 1
        low = 0 if index < size else low
        high = count if index >= count - size else high
    return low, high


class SegmentGrid(NamedTuple):
    """Geometry of one segment: its length, and where its main grid lies and how it is tiled.

    A segment without a main grid has `grid == (0, 0, 0)`.
    """

    length: int
    start: int
    grid: Triple
    tile: Triple

    @property
    def stop(self) -> int:
        return self.start + self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def counts(self) -> Triple:
        """Tiles per axis."""
        (t, h, w), (a, b, c) = self.grid, self.tile
        return -(-t // max(a, 1)), -(-h // max(b, 1)), -(-w // max(c, 1))

    def tile_index(self, number: int) -> Triple:
        """(i, j, k) of the tile with this number, in storage order."""
        _, h, w = self.counts
        return number // (h * w), number // w % h, number % w

    def tile_tokens(self, number: int) -> TokenRange:
        """The tokens of a tile."""
        index = self.tile_index(number)
        first = self.start + tile_start(self.grid, self.tile, index)
        extent = [
            min(size, n - i * size) for n, size, i in zip(self.grid, self.tile, index, strict=True)
        ]
        return first, first + extent[0] * extent[1] * extent[2]

    def runs(self, low: Triple, high: Triple) -> list[TokenRange]:
        """The w-runs of the tiles `[low, high)`, in storage order."""
        (t, h, w), (a, b, c) = self.grid, self.tile
        width = min(high[2] * c, w) - low[2] * c
        ranges = []
        for i in range(low[0], high[0]):
            ta = min(a, t - i * a)
            for j in range(low[1], high[1]):
                tb = min(b, h - j * b)
                first = self.start + tile_start(self.grid, self.tile, (i, j, low[2]))
                ranges.append((first, first + ta * tb * width))
        return ranges


def _layers(grid: SegmentGrid, low: int, high: int) -> TokenRange:
    """The tokens of the layers of tiles `[low, high)` along t, which are contiguous."""
    (t, h, w), a = grid.grid, grid.tile[0]
    return grid.start + min(low * a, t) * h * w, grid.start + min(high * a, t) * h * w


def seen_ranges(grid: SegmentGrid, number: int, window: Window) -> list[TokenRange]:
    """The keys of the queries of tile `number` (-1: of the tokens outside the main grid).

    In the order in which the kernels read them: before the main grid, after it, the layers of the
    sink (in causal time: those up to the own one), then the runs of the window without these
    layers. Empty ranges are left out.
    """
    if number < 0:
        if window.causal and grid.stop > grid.start:
            return _nonempty([(0, grid.start), (grid.stop, grid.length)])
        return _nonempty([(0, grid.length)])
    low, high = _box(grid, number, window, seen_tiles)
    layer = grid.tile_index(number)[0]
    sink = min(window.sink, layer + 1 if window.causal else grid.counts[0])
    around = [(0, grid.start), (grid.stop, grid.length), _layers(grid, 0, sink)]
    low = (max(low[0], sink), low[1], low[2])
    return _nonempty(around + grid.runs(low, high))


def seeing_ranges(grid: SegmentGrid, number: int, window: Window) -> list[TokenRange]:
    """The queries that see the keys of tile `number` (-1: the tokens outside the main grid).

    In the order in which the kernels read them. A layer of the sink is seen by all layers, or in
    causal time by itself and all that follow, whatever the window.
    """
    if number < 0:
        return _nonempty([(0, grid.length)])
    around = [(0, 0), (0, 0)] if window.causal else [(0, grid.start), (grid.stop, grid.length)]
    layer = grid.tile_index(number)[0]
    if layer < window.sink:
        first = layer if window.causal else 0
        return _nonempty([*around, _layers(grid, first, grid.counts[0])])
    low, high = _box(grid, number, window, seeing_tiles)
    return _nonempty([*around, *grid.runs(low, high)])


def _box(grid: SegmentGrid, number: int, window: Window, rule: Any) -> tuple[Triple, Triple]:
    back, ahead = window.reach
    index, counts = grid.tile_index(number), grid.counts
    pairs = [rule(index[a], counts[a], back[a], ahead[a], window.clamped(a)) for a in range(3)]
    return (pairs[0][0], pairs[1][0], pairs[2][0]), (pairs[0][1], pairs[1][1], pairs[2][1])


def _nonempty(ranges: list[TokenRange]) -> list[TokenRange]:
    return [(first, stop) for first, stop in ranges if stop > first]


def merged(ranges: list[TokenRange]) -> list[TokenRange]:
    """Sorted, with neighbours that touch joined."""
    joined: list[TokenRange] = []
    for first, stop in sorted(ranges):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((first, stop))
    return joined


Side = Literal["query", "key"]


@lru_cache(maxsize=256)
def chunks(grid: SegmentGrid, window: Window, side: Side) -> npt.NDArray[np.int64]:
    """The pieces that a segment's query (or key) blocks are cut from, int64 `[C, 4]`.

    Columns: first token and end, tile number or -1 outside the main grid, and the tokens on the
    other side that each of its blocks reads. Nothing straddles two tiles.
    """
    rule = seen_ranges if side == "query" else seeing_ranges
    pieces = [(0, grid.start), (grid.stop, grid.length)]
    if grid.stop == grid.start:
        pieces = [(0, grid.length)]
    outside = sum(stop - first for first, stop in rule(grid, -1, window))
    rows = [(first, stop, -1, outside) for first, stop in _nonempty(pieces)]
    for number in range(int(np.prod(grid.counts)) if grid.stop > grid.start else 0):
        first, stop = grid.tile_tokens(number)
        rows.append((first, stop, number, sum(e - s for s, e in rule(grid, number, window))))
    table = np.asarray(rows, np.int64).reshape(-1, 4)
    table.flags.writeable = False
    return table
