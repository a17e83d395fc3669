"""PackedLayout: the one description of a packed batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows import RowMap
from . import arena
from .host import Capacity, HostPack, padding_segments
from .parts import Grid, Order, Part, Text, Triple, as_int, as_int_triple
from .rope import (
    GridPositions,
    PerAxis,
    Rope,
    angle_tables,
    axis_frequencies,
    check_axes,
    check_frequencies,
    per_axis,
)
from .shard import LayoutShard
from .windows import Side, Window, chunks

_MAX_TOKENS = 2**31 - 1
# Tensors as long as the pack has tokens of one kind; padded to N within a capacity's buffer.
_OF_KIND = ("grid_tokens", "text_tokens")
_Build = Callable[["PackedLayout"], tuple[Tensor, ...]]


class PackedLayout:
    """Videos, images and text of any size, packed into one sequence of N tokens.

    A *segment* is a list of *parts* that attend to each other: text, and grids of (t, h, w) tokens.
    Parts follow each other in list order, segments too. Everything is computed on the host from the
    sizes and reaches the device in one asynchronous copy; nothing ever waits for the device.
    Attributes are read only.

    Host attributes:
        segments: the parts, as tuples.
        patch: (t, h, w) latent voxels per token.
        order: "raster" (w fastest) or "tile" (see `tiles`), the order of tokens within a grid.
        num_tokens, num_segments, num_parts, max_seqlen: ints.
        seqlens: tokens of each segment, list of `num_segments` ints.
        block_efficiency: tokens / (tokens of the query blocks of 128 that hold them). In tile order
            a block never straddles two tiles, because a tile is what a window belongs to; text and
            raster grids are cut per segment.
    Device attributes:
        cu_seqlens: int32 `[S + 1]`, first token of each segment and the end of the last.
        segment_of_token, part_of_token: int32 `[N]`, global numbers.
        grid_tokens, text_tokens: int64, where the grid and the text tokens sit, in packed order.
        part_starts: int32 `[P + 1]`.
        part_table: int32 `[P, 8]`: start, length, t, h, w, tile_t, tile_h, tile_w of each part; the
            grid and tile of text are 0, and so is the tile in raster order.
        raster_of_token: int64 `[N]`, the place each token would have in raster order; None if the
            layout is in raster order. `raster.index_select(0, raster_of_token)` puts tokens into
            tile order and `raster.index_copy_(0, raster_of_token, tiles)` brings them back.
        counts: int32 `[3]`: tokens, segments and parts without padding.
        segment_rows, part_rows: `RowMap`, one modulation row per segment or per part.

    Args:
        segments: the parts of each segment. Empty segments and texts are allowed.
        patch: latent voxels per token; what `patchify` cuts.
        order: "raster" or "tile".
        tile: tile of every grid in tile order that does not bring its own; None = `tile_shape`.
        device: where the tensors go; None = the default device.
        capacity: tokens, or a `Capacity`. The launch is padded to these sizes (so `num_tokens`,
            `num_segments`, `num_parts` and `max_seqlen` are the capacity's), padding tokens form
            segments of their own at the end, and `copy_` puts another pack in place: CUDA graphs
            captured with one pack replay with the next. `grid_tokens` and `text_tokens` keep their
            true length: patchify and unpatchify stay outside the graph.

    Raises:
        TypeError: a part is neither `Text` nor `Grid`.
        ValueError: a size is out of range or the pack exceeds the capacity; the message names the
            argument, what was expected and what came.
    """

    def __init__(
        self,
        segments: Sequence[Sequence[Part]],
        *,
        patch: Triple = (1, 1, 1),
        order: Order = "raster",
        tile: Triple | None = None,
        device: torch.device | str | None = None,
        capacity: int | Capacity | None = None,
    ) -> None:
        self.segments = _check_segments(segments)
        self.patch = as_int_triple("patch", patch, 1)
        if order not in ("raster", "tile"):
            raise ValueError(f'order: expected "raster" or "tile", got {order!r}')
        self.order: Order = order
        if tile is not None:
            tile = as_int_triple("tile", tile, 1)
            if order == "raster":
                raise ValueError(f"tile: expected None with order='raster', got {tile}")
        if capacity is not None and not isinstance(capacity, Capacity):
            capacity = Capacity(as_int("capacity", capacity, 1))
        self.capacity = capacity
        padding = () if capacity is None else padding_segments(self.segments, capacity)
        host = HostPack(self.segments, padding, order, tile)
        self._host = host
        self.num_tokens = host.num_tokens
        if self.num_tokens > _MAX_TOKENS:
            raise ValueError(
                f"segments: expected at most {_MAX_TOKENS} tokens, got {self.num_tokens}"
            )
        self.seqlens: list[int] = host.seqlens.tolist()
        self.num_segments = len(self.seqlens)
        self.num_parts = len(host.parts)
        self.max_seqlen = max(self.seqlens, default=0)
        if capacity is not None:
            self.max_seqlen = capacity.resolve()[3]
        target = torch.device(device) if device is not None else torch.get_default_device()
        arrays = host.arrays()
        if capacity is not None:
            for name in _OF_KIND:
                arrays[name] = np.pad(arrays[name], (0, self.num_tokens - arrays[name].size))
        self._buffer, self._sections = arena.pack(arrays, pin=target.type == "cuda")
        self._upload(target)

    @classmethod
    def from_grids(
        cls,
        latent_grids: Sequence[Triple],
        patch: Triple = (1, 2, 2),
        order: Order = "raster",
        text_lengths: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        pad: bool = False,
    ) -> PackedLayout:
        """One segment per clip: its text, if `text_lengths` are given, then its grid.

        Args:
            latent_grids: (t, h, w) of each latent clip; multiples of `patch`, unless `pad`.
            patch: latent voxels per token.
            text_lengths: text tokens of each clip.
            pad: round sizes up to whole patches; `patchify(..., pad=...)` fills the clips up.

        Raises:
            ValueError: a grid is not a multiple of `patch`, or the lengths differ.
        """
        patch = as_int_triple("patch", patch, 1)
        grids = []
        for i, size in enumerate(latent_grids):
            size = as_int_triple(f"latent_grids[{i}]", size, 1)
            if not pad and any(n % p for n, p in zip(size, patch, strict=True)):
                raise ValueError(f"latent_grids[{i}]: expected multiples of {patch}, got {size}")
            t, h, w = (-(-n // p) for n, p in zip(size, patch, strict=True))
            grids.append(Grid(t, h, w))
        segments: list[list[Part]] = [[grid] for grid in grids]
        if text_lengths is not None:
            if len(text_lengths) != len(grids):
                raise ValueError(
                    f"text_lengths: expected {len(grids)} lengths, one per grid, got "
                    f"{len(text_lengths)}"
                )
            segments = [[Text(n), grid] for n, grid in zip(text_lengths, grids, strict=True)]
        return cls(segments, patch=patch, order=order, device=device)

    def _upload(self, device: torch.device) -> None:
        """Puts every tensor on `device` and starts empty caches."""
        host = self._host
        if device.type == "cuda" and not self._buffer.is_pinned():
            self._buffer = self._buffer.pin_memory()
        buffer = self._buffer.to(device, non_blocking=True)
        if self.capacity is not None and buffer is self._buffer:
            buffer = buffer.clone()  # copy_ writes into it
        self._device_buffer = buffer
        tensors = arena.unpack(buffer, self._sections)
        self.device = buffer.device
        self.counts = tensors["counts"]
        self.cu_seqlens = tensors["cu_seqlens"]
        self.part_starts = tensors["part_starts"]
        self.part_table = tensors["part_table"]
        self.segment_of_token = tensors["segment_of_token"]
        self.part_of_token = tensors["part_of_token"]
        self.raster_of_token = tensors.get("raster_of_token")
        self._of_kind = {name: tensors[name] for name in _OF_KIND}
        self._cut_kinds()
        self.segment_rows = RowMap(
            host.num_tokens, self.num_segments, 0, self.segment_of_token, None, self.cu_seqlens
        )
        self.part_rows = RowMap(
            host.num_tokens, self.num_parts, 0, self.part_of_token, None, self.part_starts
        )
        self._positions = GridPositions(
            self.part_of_token, tensors["position_table"], host.position_columns
        )
        self._ropes: dict[Hashable, Rope] = {}
        self._work: dict[int, Tensor] = {}
        self._window_table = tensors.get("window_table")
        self._no_window = host.no_window
        self._window_works: dict[tuple[int, Window, Side], Tensor] = {}
        self._derived: dict[Hashable, tuple[_Build, tuple[Tensor, ...]]] = {}

    def _cut_kinds(self) -> None:
        """In capacity mode the two index tensors are longer than what they hold."""
        host = self._host
        grid = sum(part.num_tokens for part in host.parts if isinstance(part, Grid))
        self.num_grid_tokens = grid
        self.num_text_tokens = host.num_real_tokens - grid
        self.text_tokens = self._of_kind["text_tokens"]
        self.grid_tokens = self._of_kind["grid_tokens"]
        if self.capacity is not None:
            self.text_tokens = self.text_tokens[: self.num_text_tokens]
            self.grid_tokens = self.grid_tokens[:grid]

    @property
    def block_efficiency(self) -> float:
        return self._host.block_efficiency()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of all segments, without padding."""
        return tuple(part for segment in self.segments for part in segment)

    def tile_of(self, grid: Grid) -> Triple:
        """The tile that stores `grid` in tile order (clipped to the grid)."""
        return self._host.tile_of(grid)

    def coordinates(self) -> Tensor:
        """(t, h, w) of each token within its part, int32 `[N, 3]`, 0 for text. Not cached."""
        return self._send(self._host.coordinates())

    def rope(
        self,
        axes: tuple[int, int, int],
        theta: PerAxis = 10000.0,
        *,
        ntk: PerAxis = 1.0,
        interpolation: PerAxis = 1.0,
        frequencies: Sequence[Sequence[float]] | None = None,
    ) -> Rope:
        """Rotary tables of this pack, built once per set of arguments.

        Args:
            axes: rotated features on (t, h, w): even, their sum is the rotary dimension.
            theta: base of the frequencies `theta ** (-2*i / axes[a])`; one, or one per axis.
            ntk: NTK-aware context extension: theta grows by `ntk ** (d / (d - 2))`.
            interpolation: position interpolation: positions are divided by it.
            frequencies: angles per unit of position, `axes[a] / 2` per axis, in place of theta, ntk
                and interpolation (LTX-Video's reach 15,700).

        Returns:
            `Rope` over all N tokens, whose positions kernels compute from the grids: it holds no
            tensor per token besides `part_of_token`. Its tables have one row per step of each
            distinct (origin, scale) of an axis. Text tokens have position 0: they are not turned.

        Raises:
            ValueError: an argument is out of range, or the tables have more rows than
                `capacity.positions`.
            RuntimeError: called for the first time inside a torch.compile region.
        """
        key = (axes, theta, ntk, interpolation, frequencies)
        if not torch.compiler.is_compiling():
            return self._rope(_frozen(key))
        if key not in self._ropes:
            raise RuntimeError(
                "PackedLayout.rope: expected the tables to exist before a compiled region uses "
                f"them; call layout.rope({axes!r}, ...) with these arguments once outside it"
            )
        return self._ropes[key]

    def _rope(self, key: Any) -> Rope:
        if key in self._ropes:
            return self._ropes[key]
        axes, theta, ntk, interpolation, frequencies = key
        axes = check_axes(axes)
        if frequencies is None:
            rates = axis_frequencies(
                axes,
                per_axis("theta", theta),
                per_axis("ntk", ntk),
                per_axis("interpolation", interpolation),
            )
        else:
            rates = check_frequencies(axes, frequencies)
        values = self._host.positions()
        if self.capacity is not None:
            rows = self.capacity.resolve()[4]
            if values.size > rows:
                raise ValueError(
                    f"capacity.positions: the pack has {values.size} positions in its tables, more "
                    f"than {rows}"
                )
            values = np.pad(values, (0, rows - values.size))
        cos, sin = angle_tables(values, rates)
        rope = Rope(self._send(cos), self._send(sin), self._positions, axes)
        self._ropes[key] = rope
        return rope

    def work(self, block: int) -> Tensor:
        """Work list of an attention kernel: int32 `[W, 2]` (segment, block of it), longest first.

        Entries of a padded list (capacity) name a block beyond the end of segment 0. Cached.
        """
        if block not in self._work:
            self._work[block] = self._send(
                self._host.work(as_int("block", block, 1), self._work_rows(block))
            )
        return self._work[block]

    def window_table(self) -> Tensor:
        """Main grid of each segment, int32 `[S, 8]`: its first token, counted from the segment's;
        t, h, w; tile_t, tile_h, tile_w; 0. All zero for a segment without one.

        Raises:
            ValueError: the layout is in raster order, or a segment has two grids to be made.
        """
        if self._no_window is not None:
            raise ValueError(self._no_window)
        assert self._window_table is not None  # there is one in tile order
        return self._window_table

    def window_work(self, block: int, window: Window, side: Side) -> Tensor:
        """Work list of windowed attention: int32 `[W, 4]`, dearest first. Cached.

        Each row is a block of at most `block` tokens of a segment that see (side "query") or are
        seen by (side "key") the same tokens: segment, first token and end of the piece the block
        is cut from (counted from the segment's first token), and tile number of the main grid, or
        -1 outside it. Rows that pad a list (capacity) name segment -1.

        Raises:
            RuntimeError: called for the first time inside a torch.compile region.
        """
        key = (block, window, side)
        if key not in self._window_works:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "PackedLayout.window_work: expected the list to exist before a compiled region "
                    "uses it; call prepare_window(layout, window, q) once outside it"
                )
            rows = None if self.capacity is None else self.capacity.window_blocks(block)
            self._window_works[key] = self._send(self._host.window_work(block, window, side, rows))
        return self._window_works[key]

    @property
    def num_window_chunks(self) -> int:
        """Tiles of main grids and pieces outside them, or a bound of it within a capacity.

        Raises:
            ValueError: the pack has more of them than the capacity provides for.
        """
        return self._host.num_window_chunks(self.capacity)

    def derived(self, key: Hashable, build: _Build) -> tuple[Tensor, ...]:
        """Tensors that `build` computes from a layout, cached under `key`; `copy_` renews them.

        Raises:
            RuntimeError: called for the first time inside a torch.compile region.
        """
        if key not in self._derived:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "PackedLayout.derived: expected the tensors to exist before a compiled region "
                    "uses them; call prepare_window(layout, window, q) once outside it"
                )
            self._derived[key] = build, build(self)
        return self._derived[key][1]

    def window_pairs(self, window: Window) -> int:
        """(query, key) pairs that attention under a window computes: what a FLOP count takes."""
        tables = [chunks(grid, window, "query") for grid in self._host.segment_grids]
        return sum(int(((table[:, 1] - table[:, 0]) * table[:, 3]).sum()) for table in tables)

    def _work_rows(self, block: int) -> int | None:
        if self.capacity is None:
            return None
        return self.num_tokens // block + self.num_segments

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout on another device (itself if it is there); caches start empty."""
        target = torch.device(device)
        if target == self.device:
            return self
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._upload(target)
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles: tensors over one buffer again, empty caches."""
        self.__dict__.update(state)
        self._upload(self.device)

    def shard(self, rank: int, world: int) -> LayoutShard:
        """The tokens of one rank of a context-parallel group, for row ops and RoPE.

        Rank r holds tokens `[r*N // world, (r+1)*N // world)`.
        """
        world = as_int("world", world, 1)
        rank = as_int("rank", rank, 0)
        if rank >= world:
            raise ValueError(f"rank: expected less than world ({world}), got {rank}")
        start, stop = (r * self.num_tokens // world for r in (rank, rank + 1))
        return LayoutShard(self, rank, world, start, stop)

    def copy_(self, other: PackedLayout) -> PackedLayout:
        """Puts the pack of `other` into the tensors of this layout, for CUDA graph replay.

        Both need the same capacity and order. Every RoPE table and work list that this layout has
        handed out is updated in place. Nothing waits for the device.

        Raises:
            ValueError: a layout has no capacity, or capacity or order differ.
        """
        if self.capacity is None or other.capacity is None:
            raise ValueError("copy_: expected two layouts with a capacity, got one without")
        mine, theirs = self.capacity.resolve(), other.capacity.resolve()
        if mine != theirs or self.order != other.order:
            raise ValueError(
                f"copy_: expected capacity {mine} and order {self.order!r}, got {theirs} and "
                f"{other.order!r}"
            )
        ropes = [(rope, other._rope(key)) for key, rope in self._ropes.items()]
        lists = [(work, other.work(block)) for block, work in self._work.items()]
        lists += [(work, other.window_work(*key)) for key, work in self._window_works.items()]
        for key, (build, tensors) in self._derived.items():
            lists += zip(tensors, other.derived(key, build), strict=True)
        self._device_buffer.copy_(other._device_buffer, non_blocking=True)
        for rope, source in ropes:
            rope.cos.copy_(source.cos, non_blocking=True)
            rope.sin.copy_(source.sin, non_blocking=True)
        for work, values in lists:
            work.copy_(values, non_blocking=True)
        self.segments, self.patch, self.seqlens = other.segments, other.patch, other.seqlens
        self._host, self._buffer = other._host, other._buffer
        self._no_window = other._no_window
        self._cut_kinds()
        return self

    def _send(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def __repr__(self) -> str:
        return (
            f"PackedLayout({self.num_tokens} tokens in {self.num_segments} segments, "
            f"{self.order} order, patch {self.patch}, {self.device})"
        )


def _check_segments(segments: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], ...]:
    for s, segment in enumerate(segments):
        if isinstance(segment, (Text, Grid)):
            raise TypeError(f"segments[{s}]: expected a list of parts, got {segment!r}")
        for p, part in enumerate(segment):
            if not isinstance(part, (Text, Grid)):
                raise TypeError(f"segments[{s}][{p}]: expected Text or Grid, got {part!r}")
    return tuple(tuple(segment) for segment in segments)


def _frozen(value: Any) -> Hashable:
    """Lists and arrays as tuples, so that they can be part of a key."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_frozen(item) for item in value)
    return value
