"""A rank's slice of a packed batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..rows import RowMap
from .host import HostPack
from .parts import Text
from .rope import Rope

if TYPE_CHECKING:
    from .layout import PackedLayout


class Pieces:
    """Pieces of segments that follow each other in a slice, as an attention kernel wants them.

    Attributes:
        lengths: rows of each piece; none is 0.
        longest: the largest of them.
        cu_seqlens: int32 `[pieces + 1]` on the device of the layout.
    """

    def __init__(self, lengths: list[int], cu_seqlens: Tensor, layout: PackedLayout) -> None:
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        self.cu_seqlens = cu_seqlens
        self._layout = layout
        self._work: dict[int, Tensor] = {}

    def work(self, block: int) -> Tensor:
        """The work list, int32 `[W, 2]` (piece, block of it), longest piece first. Cached."""
        if block not in self._work:
            pack = HostPack(tuple((Text(n),) for n in self.lengths), (), "raster", None)
            self._work[block] = self._layout._send(pack.work(block))
        return self._work[block]


@dataclass(frozen=True)
class Visit:
    """Keys of another rank that some queries of this rank see: two pieces of one segment."""

    query_rows: slice
    queries: Pieces
    keys: Pieces


@dataclass(frozen=True)
class RingPlan:
    """Which rows of which rank a rank attends to in ring attention, and who attends to its own.

    At step i rank r meets the keys of rank r - i, and its own keys are met by rank r + i (mod
    world). Slices and segments are intervals, and disjoint: a segment that reaches into two slices
    covers all between them, so two ranks share at most one, and a visit is one dense block.

    Attributes:
        steps: the steps at which any rank meets any; the same list on every rank.
        own: the pieces of segments in this rank's slice.
        visits: step -> the keys met.
        sends: step -> own rows that another rank meets.
    """

    steps: list[int]
    own: Pieces
    visits: dict[int, Visit]
    sends: dict[int, slice]


@dataclass(frozen=True)
class LayoutShard:
    """Tokens `[start, stop)` of a layout, for context parallelism.

    Row ops (norms, modulation, gates) and RoPE work on the slice; modulation rows keep the numbers
    of the whole pack, so the gradients of all ranks add up to the gradient of the pack. Attention
    needs the whole pack: see `sora_kernels.context_parallel`.
    """

    layout: PackedLayout
    rank: int
    world: int
    start: int
    stop: int
    _plans: dict[bool, tuple[HostPack, RingPlan]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @cached_property
    def bounds(self) -> list[int]:
        """First token of every rank, and the end of the last, `world + 1` host integers."""
        return [rank * self.layout.num_tokens // self.world for rank in range(self.world + 1)]

    @cached_property
    def segment_rows(self) -> RowMap:
        return self._slice(self.layout.segment_rows)

    @cached_property
    def part_rows(self) -> RowMap:
        return self._slice(self.layout.part_rows)

    def rope(self, axes: tuple[int, int, int], *args: Any, **kwargs: Any) -> Rope:
        """`PackedLayout.rope` of these tokens."""
        return self.layout.rope(axes, *args, **kwargs).slice(self.start, self.stop)

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's rows of `tokens` `[N, ...]` (a view)."""
        if tokens.shape[0] != self.layout.num_tokens:
            raise ValueError(
                f"tokens: expected {self.layout.num_tokens} rows, got {tuple(tokens.shape)}"
            )
        return tokens[self.start : self.stop]

    def ring_plan(self, causal: bool) -> RingPlan:
        """What ring attention computes and sends, built on the host once per pack and cached.

        `PackedLayout.copy_` puts another pack in place; the next call then makes a new plan.
        """
        host = self.layout._host
        made = self._plans.get(causal)
        if made is None or made[0] is not host:
            made = self._plans[causal] = (host, self._make_plan(causal))
        return made[1]

    def _make_plan(self, causal: bool) -> RingPlan:
        steps: set[int] = set()
        sends: dict[int, slice] = {}
        met: dict[int, tuple[slice, int]] = {}  # step -> rows of the queries, number of keys

        def meet(step: int, asks: int, rows: slice, owns: int, key_rows: slice) -> None:
            steps.add(step)
            if asks == self.rank:
                met[step] = rows, key_rows.stop - key_rows.start
            if owns == self.rank:
                sends[step] = key_rows

        for low, high, rows_low, rows_high in self._shared():
            meet(high - low, high, rows_high, low, rows_low)
            if not causal:
                meet(self.world - (high - low), low, rows_low, high, rows_high)

        ends = accumulate(self.layout.seqlens)
        cuts = [min(max(end, self.start), self.stop) for end in (0, *ends)]
        own = [b - a for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
        sides = [own]
        for rows, num_keys in met.values():
            sides += [[rows.stop - rows.start], [num_keys]]
        offsets = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in sides]
        on_device = self.layout._send(np.concatenate(offsets)).split([x.size for x in offsets])
        pieces = [Pieces(n, cu, self.layout) for n, cu in zip(sides, on_device, strict=True)]
        visits = {
            step: Visit(met[step][0], pieces[1 + 2 * i], pieces[2 + 2 * i])
            for i, step in enumerate(met)
        }
        return RingPlan(sorted(steps), pieces[0], visits, sends)

    def _shared(self) -> Iterator[tuple[int, int, slice, slice]]:
        """(low rank, high rank, rows of both) of every pair of slices that share a segment."""
        bounds = self.bounds
        cu = list(accumulate(self.layout.seqlens, initial=0))
        for low in range(self.world):
            start, stop = bounds[low], bounds[low + 1]
            if start == stop:
                continue
            segment = bisect_right(cu, stop - 1) - 1  # of the last token of `low`
            begin, end = cu[segment], cu[segment + 1]
            for high in range(low + 1, self.world):
                if bounds[high] >= end:
                    break
                if bounds[high] < bounds[high + 1]:
                    rows_low = slice(max(begin, start) - start, stop - start)
                    rows_high = slice(0, min(end, bounds[high + 1]) - bounds[high])
                    yield low, high, rows_low, rows_high

    def _slice(self, rows: RowMap) -> RowMap:
        assert rows.index is not None and rows.offsets is not None
        offsets = rows.offsets.clamp(self.start, self.stop) - self.start
        index = rows.index[self.start : self.stop]
        return RowMap(self.num_tokens, rows.num_rows, 0, index, None, offsets)
