"""A rank's slice of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rows import RowMap
from .rope import Rope

if TYPE_CHECKING:
    from .layout import PackedLayout


@dataclass(frozen=True)
class LayoutShard:
    """Tokens `[start, stop)` of a layout, for context parallelism.

    Row ops (norms, modulation, gates) and RoPE work on the slice; modulation rows keep the numbers
    of the whole pack, so the gradients of all ranks add up to the gradient of the pack. Attention
    needs the whole pack: exchange tokens for heads (Ulysses) and use `layout`, or merge with LSE.
    """

    layout: PackedLayout
    rank: int
    world: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

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

    def _slice(self, rows: RowMap) -> RowMap:
        assert rows.index is not None and rows.offsets is not None
        offsets = rows.offsets.clamp(self.start, self.stop) - self.start
        index = rows.index[self.start : self.stop]
        return RowMap(self.num_tokens, rows.num_rows, 0, index, None, offsets)
