"""The host half of a layout: everything computed with NumPy from the sizes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .parts import Grid, Order, Part, Text, Triple, as_int
from .rope import POSITION_COLUMNS, TILE_COLUMNS
from .tiles import QUERY_BLOCK, tile_efficiency, tile_order, tile_shape
from .windows import SegmentGrid, Side, Window, chunks

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

PART_COLUMNS = ("start", "length", "t", "h", "w", "tile_t", "tile_h", "tile_w")


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes of a padded layout, for CUDA graphs: every pack within them launches the same.

    Attributes:
        tokens: N of every tensor.
        segments: None = one per 256 tokens, at least 16. One stays free for padding tokens.
        parts: None = two per segment.
        max_seqlen: None = `tokens`.
        positions: rows of the RoPE tables.
        blocks: rows of the work lists of windowed attention. None = twice the blocks of the tokens
            and four per part.
    """

    tokens: int
    segments: int | None = None
    parts: int | None = None
    max_seqlen: int | None = None
    positions: int = 1024
    blocks: int | None = None

    def resolve(self) -> tuple[int, int, int, int, int]:
        """(tokens, segments, parts, max_seqlen, positions), validated."""
        tokens = as_int("capacity.tokens", self.tokens, 1)
        segments = self.segments
        segments = max(16, -(-tokens // 256)) if segments is None else segments
        segments = as_int("capacity.segments", segments, 1)
        parts = 2 * segments if self.parts is None else self.parts
        parts = as_int("capacity.parts", parts, segments)
        max_seqlen = tokens if self.max_seqlen is None else self.max_seqlen
        max_seqlen = as_int("capacity.max_seqlen", max_seqlen, 1)
        return tokens, segments, parts, max_seqlen, as_int("capacity.positions", self.positions, 1)

    def window_blocks(self, block: int) -> int:
        """Rows of a windowed work list of blocks of so many tokens."""
        if self.blocks is not None:
            return as_int("capacity.blocks", self.blocks, 1)
        tokens, _, parts, *_ = self.resolve()
        return 2 * -(-tokens // block) + 4 * parts


@dataclass(frozen=True)
class HostPack:
    """Sizes and offsets of a pack. `padding` holds the segments that only fill up a capacity."""

    segments: tuple[tuple[Part, ...], ...]
    padding: tuple[tuple[Text, ...], ...]
    order: Order
    tile: Triple | None

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, padding last."""
        return [part for segment in (*self.segments, *self.padding) for part in segment]

    @cached_property
    def part_lengths(self) -> Int64Array:
        return np.fromiter((part.num_tokens for part in self.parts), np.int64, len(self.parts))

    @cached_property
    def part_starts(self) -> Int64Array:
        """First token of each part, and the end of the last, `[P + 1]`."""
        return _offsets(self.part_lengths)

    @cached_property
    def num_real_parts(self) -> int:
        return sum(map(len, self.segments))

    @cached_property
    def seqlens(self) -> Int64Array:
        """Tokens of each segment, padding segments last, `[S]`."""
        sizes = [len(segment) for segment in (*self.segments, *self.padding)]
        return np.diff(self.part_starts[_offsets(np.asarray(sizes, np.int64))])

    @property
    def num_tokens(self) -> int:
        return int(self.part_starts[-1])

    @property
    def num_real_tokens(self) -> int:
        return int(self.part_starts[self.num_real_parts])

    def tile_of(self, grid: Grid) -> Triple:
        """The tile that stores `grid`: the part's own, else the layout's, else `tile_shape`."""
        t, h, w = grid.tile or self.tile or tile_shape(grid.t, grid.h, grid.w)
        return min(t, grid.t), min(h, grid.h), min(w, grid.w)

    def token_order(self, grid: Grid) -> Int32Array | None:
        """Raster index of each stored token of `grid`; None if they are stored in raster order."""
        if self.order == "raster":
            return None
        return tile_order((grid.t, grid.h, grid.w), self.tile_of(grid))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that the device needs, by name."""
        lengths = self.part_lengths
        real = self.num_real_parts
        is_grid = np.asarray([isinstance(part, Grid) for part in self.parts], np.bool_)
        token_is_grid = np.repeat(is_grid, lengths)
        seqlens = self.seqlens
        arrays: dict[str, npt.NDArray[Any]] = {
            "counts": np.asarray([self.num_real_tokens, len(self.segments), real], np.int32),
            "cu_seqlens": _offsets(seqlens).astype(np.int32),
            "part_starts": self.part_starts.astype(np.int32),
            "part_table": self._part_table(),
            "position_table": self.position_table(),
            "segment_of_token": np.repeat(np.arange(seqlens.size, dtype=np.int32), seqlens),
            "part_of_token": np.repeat(np.arange(lengths.size, dtype=np.int32), lengths),
            "grid_tokens": np.flatnonzero(token_is_grid),
            "text_tokens": np.flatnonzero(~token_is_grid[: self.num_real_tokens]),
        }
        if self.order == "tile":
            arrays["raster_of_token"] = self._raster_of_token()
            arrays["window_table"] = self._window_table()
        return arrays

    def block_efficiency(self) -> float:
        """Tokens / tokens of the query blocks that hold them; see `PackedLayout`."""
        if self.num_real_tokens == 0:
            return 1.0
        covered = 0.0
        for segment in self.segments:
            loose = 0
            for part in segment:
                if self.order == "tile" and isinstance(part, Grid):
                    grid = (part.t, part.h, part.w)
                    covered += part.num_tokens / tile_efficiency(grid, self.tile_of(part))
                else:
                    loose += part.num_tokens
            covered += -(-loose // QUERY_BLOCK) * QUERY_BLOCK
        return self.num_real_tokens / covered

    def _part_table(self) -> Int32Array:
        table = np.zeros((len(self.parts), len(PART_COLUMNS)), np.int32)
        table[:, 0] = self.part_starts[:-1]
        table[:, 1] = self.part_lengths
        rows = [i for i, part in enumerate(self.parts) if isinstance(part, Grid)]
        if rows:
            grids = [part for part in self.parts if isinstance(part, Grid)]
            table[rows, 2:5] = [(g.t, g.h, g.w) for g in grids]
            if self.order == "tile":
                table[rows, 5:8] = [self.tile_of(g) for g in grids]
        return table

    def _raster_of_token(self) -> Int64Array:
        places = np.arange(self.num_tokens, dtype=np.int64)
        for part, start, length in zip(
            self.parts, self.part_starts, self.part_lengths, strict=False
        ):
            if isinstance(part, Grid):
                places[start : start + length] = start + tile_order(
                    (part.t, part.h, part.w), self.tile_of(part)
                )
        return places

    def coordinates(self) -> Int32Array:
        """(t, h, w) of each token within its part, int32 `[N, 3]`; 0 for text."""
        table = np.zeros((self.num_tokens, 3), np.int32)
        for part, start, length in zip(
            self.parts, self.part_starts, self.part_lengths, strict=False
        ):
            if isinstance(part, Grid):
                axes = [np.arange(n, dtype=np.int32) for n in (part.t, part.h, part.w)]
                table[start : start + length] = self.per_token(part, axes)
        return table

    @cached_property
    def position_runs(self) -> dict[tuple[float, float], tuple[int, int]]:
        """First row and length of each run of positions in the tables, by (origin, scale).

        Row `first + i` holds position `origin + i * scale`. A run serves every part and axis with
        its origin and scale. Row 0 always holds position 0: text takes it.
        """
        lengths: dict[tuple[float, float], int] = {(0.0, 1.0): 1}
        for part in self.parts:
            if isinstance(part, Grid):
                for n, *key in zip((part.t, part.h, part.w), part.origin, part.scale, strict=True):
                    origin, scale = key
                    lengths[origin, scale] = max(n, lengths.get((origin, scale), 0))
        runs, first = {}, 0
        for run, length in lengths.items():
            runs[run] = (first, length)
            first += length
        return runs

    def positions(self) -> npt.NDArray[np.float64]:
        """The position in each row of the tables, fp64 `[P]`."""
        return np.concatenate(
            [
                origin + scale * np.arange(length, dtype=np.float64)
                for (origin, scale), (_, length) in self.position_runs.items()
            ]
        )

    @property
    def position_columns(self) -> int:
        return len(POSITION_COLUMNS) + (len(TILE_COLUMNS) if self.order == "tile" else 0)

    def position_table(self) -> Int32Array:
        """`GridPositions.parts`, flat: what gives the table rows of each token."""
        tiled = self.order == "tile"
        table = np.ones((len(self.parts) + 1, self.position_columns), np.int32)
        table[:, 0] = self.part_starts
        table[:, 1], table[:, 4:7] = 0, 0
        runs = self.position_runs
        for row, part in zip(table, self.parts, strict=False):
            if isinstance(part, Grid):
                row[1:4] = part.num_tokens - 1, part.h, part.w
                row[4:7] = [runs[key][0] for key in zip(part.origin, part.scale, strict=True)]
                if tiled:
                    row[7:] = part.t, *self.tile_of(part)
        return table.ravel()

    def per_token(self, grid: Grid, axes: Sequence[Int32Array]) -> Int32Array:
        """Values per axis, `[t]`, `[h]`, `[w]`, spread to the tokens as stored, `[t*h*w, 3]`."""
        spread = np.empty((grid.t, grid.h, grid.w, 3), np.int32)
        spread[..., 0] = axes[0][:, None, None]
        spread[..., 1] = axes[1][:, None]
        spread[..., 2] = axes[2]
        flat = spread.reshape(-1, 3)
        order = self.token_order(grid)
        return flat if order is None else flat.take(order, axis=0)

    def work(self, block: int, rows: int | None = None) -> Int32Array:
        """(segment, block of it) pairs, longest segment first, int32 `[W, 2]`.

        With `rows`, the list is filled up with blocks that lie beyond the end of segment 0.
        """
        blocks = -(-self.seqlens // block)
        order = np.argsort(-self.seqlens, kind="stable")
        count = blocks[order]
        segment = np.repeat(order, count)
        first = np.repeat(_offsets(count)[:-1], count)
        work = np.stack([segment, np.arange(segment.size) - first], axis=1).astype(np.int32)
        if rows is None:
            return work
        filler = np.asarray([[0, -(-self.num_tokens // block)]], np.int32)
        return np.concatenate([work, filler.repeat(rows - len(work), axis=0)])

    @cached_property
    def no_window(self) -> str | None:
        """Why windows cannot apply to this pack, or None if they can."""
        if self.order != "tile":
            return f'window: expected a layout with order="tile", got order="{self.order}"'
        for number, segment in enumerate(self.segments):
            if sum(isinstance(part, Grid) and not part.given for part in segment) > 1:
                return (
                    f"window: expected at most one grid to be made in a segment, and others "
                    f"with given=True, got two in segments[{number}]"
                )
        return None

    @cached_property
    def segment_grids(self) -> list[SegmentGrid]:
        """Where the main grid of each segment lies, padding segments last."""
        if self.no_window is not None:
            raise ValueError(self.no_window)
        return [self._segment_grid(segment) for segment in (*self.segments, *self.padding)]

    def num_window_chunks(self, capacity: Capacity | None) -> int:
        """See `PackedLayout.num_window_chunks`."""
        chunks = sum(
            math.prod(grid.counts) + (grid.start > 0) + (grid.length > grid.stop)
            if grid.stop > grid.start
            else grid.length > 0
            for grid in self.segment_grids
        )
        if capacity is None:
            return chunks
        bound = capacity.window_blocks(QUERY_BLOCK)
        if chunks > bound:
            raise ValueError(
                f"capacity.blocks: the pack has {chunks} tiles and pieces outside them, more than "
                f"{bound}"
            )
        return bound

    def _segment_grid(self, segment: Sequence[Part]) -> SegmentGrid:
        grid = SegmentGrid(0, 0, (0, 0, 0), (0, 0, 0))
        length = 0
        for part in segment:
            if isinstance(part, Grid) and not part.given:
                grid = SegmentGrid(0, length, (part.t, part.h, part.w), self.tile_of(part))
            length += part.num_tokens
        return grid._replace(length=length)

    def _window_table(self) -> Int32Array:
        """See `PackedLayout.window_table`. Nothing reads it if windows cannot apply."""
        if self.no_window is not None:
            return np.zeros((len(self.segments) + len(self.padding), 8), np.int32)
        rows = [(g.start, *g.grid, *g.tile, 0) for g in self.segment_grids]
        return np.asarray(rows, np.int32).reshape(-1, 8)

    def window_work(
        self, block: int, window: Window, side: Side, rows: int | None = None
    ) -> Int32Array:
        """Blocks of the windowed kernels, dearest first; see `PackedLayout.window_work`."""
        tables = []
        for number, grid in enumerate(self.segment_grids):
            table = chunks(grid, window, side)
            blocks = -(-(table[:, 1] - table[:, 0]) // block)
            each = np.repeat(table, blocks, axis=0)
            first = each[:, 0] + block * (
                np.arange(len(each)) - np.repeat(_offsets(blocks)[:-1], blocks)
            )
            segment = np.full(len(each), number)
            tables.append(np.stack([segment, first, each[:, 1], each[:, 2], each[:, 3]], axis=1))
        work = np.concatenate(tables) if tables else np.zeros((0, 5), np.int64)
        order = np.argsort(-work[:, 4], kind="stable")
        listed: Int32Array = work[order, :4].astype(np.int32)
        if rows is None:
            return listed
        if len(listed) > rows:
            raise ValueError(
                f"capacity.blocks: the pack has {len(listed)} blocks of {block} tokens under "
                f"{window}, more than {rows}"
            )
        filler = np.asarray([[-1, 0, 0, -1]], np.int32)
        return np.concatenate([listed, filler.repeat(rows - len(listed), axis=0)])


def _offsets(lengths: Int64Array) -> Int64Array:
    offsets = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def padding_segments(
    segments: Sequence[Sequence[Part]], capacity: Capacity
) -> tuple[tuple[Text, ...], ...]:
    """Segments that fill a pack up to its capacity.

    The free segments share the padding tokens evenly, so that every op computes finite values for
    them at little cost (attention over a padding segment is short) and none needs a special case.
    The free parts are empty and belong to the last segment.
    """
    tokens, num_segments, num_parts, max_seqlen, _ = capacity.resolve()
    used = [sum(part.num_tokens for part in segment) for segment in segments]
    used_parts = sum(map(len, segments))
    free = num_segments - len(segments)
    free_parts = num_parts - used_parts
    if sum(used) > tokens:
        raise ValueError(f"capacity.tokens: the pack has {sum(used)} tokens, more than {tokens}")
    if free < 1:
        raise ValueError(
            "capacity.segments: expected one more than the segments of the pack "
            f"({len(segments)}), got {num_segments}"
        )
    if free_parts < free:
        raise ValueError(
            f"capacity.parts: the pack has {used_parts} parts and {free} padding segments, more "
            f"than {num_parts}"
        )
    if max(used, default=0) > max_seqlen:
        raise ValueError(
            f"capacity.max_seqlen: a segment has {max(used)} tokens, more than {max_seqlen}"
        )
    share, rest = divmod(tokens - sum(used), free)
    if share + (rest > 0) > max_seqlen:
        raise ValueError(
            f"capacity.max_seqlen: {tokens - sum(used)} padding tokens do not fit into {free} free "
            f"segments of at most {max_seqlen} tokens"
        )
    filled: list[tuple[Text, ...]] = [(Text(share + (i < rest)),) for i in range(free)]
    filled[-1] += (Text(0),) * (free_parts - free)
    return tuple(filled)
