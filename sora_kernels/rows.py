"""RowMap: which modulation row each token uses, and the inverse that the backward needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """Token -> modulation row, built once per batch and shared by every block of a model.

    Either *mapped* (``index`` says the row of each token) or *uniform* (``index is None`` and
    token ``n`` uses row ``n // tokens_per_row``, which needs no memory at all).

    Attributes:
        num_tokens: N.
        num_rows: R.
        tokens_per_row: run length of a uniform map; 0 for a mapped one.
        index: int32 ``[N]``, row of each token; None if uniform.
        order: int32 ``[N]``, tokens sorted (stably) by row; None when tokens already lie in
            contiguous runs of nondecreasing row.
        offsets: int32 ``[R + 1]``; the tokens of row r are ``order[offsets[r]:offsets[r + 1]]``.
            None if uniform.
    """

    num_tokens: int
    num_rows: int
    tokens_per_row: int = 0
    index: Tensor | None = None
    order: Tensor | None = None
    offsets: Tensor | None = None

    @staticmethod
    def uniform(num_rows: int, tokens_per_row: int) -> RowMap:
        """Row of token n is ``n // tokens_per_row``."""
        return RowMap(num_rows * tokens_per_row, num_rows, tokens_per_row)

    @staticmethod
    def from_index(index: Tensor, num_rows: int, *, contiguous: bool | None = None) -> RowMap:
        """Builds the map of an integer ``index`` ``[N]`` with values in ``[0, num_rows)``.

        Args:
            contiguous: True if ``index`` is known to be nondecreasing (skips the sort and the
                check). None: looked up, which on a GPU is one synchronisation, once per batch;
                the values are validated in the same look.

        Raises:
            TypeError: ``index`` is not an integer tensor.
            ValueError: ``index`` is not one-dimensional, or (checked only when ``contiguous`` is
                None) holds a value outside ``[0, num_rows)``.
        """
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index: expected int32 or int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index: expected one dimension, got shape {tuple(index.shape)}")
        if num_rows < 0 or (num_rows == 0 and index.numel() > 0):
            raise ValueError(f"num_rows: expected a positive number, got {num_rows}")
        if contiguous is None and index.numel() > 0:
            low, high, decreasing = torch.stack(
                [index.min(), index.max(), (index[1:] < index[:-1]).sum()]
            ).tolist()
            if low < 0 or high >= num_rows:
                raise ValueError(
                    f"index: expected values in [0, {num_rows}), got [{int(low)}, {int(high)}]"
                )
            contiguous = decreasing == 0
        index = index.to(torch.int32).contiguous()
        counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=index.device)
        # index_add_ on integers is exact, hence deterministic in any order.
        counts.index_add_(0, index.long() + 1, torch.ones_like(index, dtype=torch.int64))
        offsets = counts.cumsum(0).to(torch.int32)
        order = None
        if not contiguous:
            order = torch.argsort(index, stable=True).to(torch.int32)
        return RowMap(index.numel(), num_rows, 0, index, order, offsets)

    def to(self, device: torch.device | str) -> RowMap:
        """The same map with its tensors on ``device``."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return RowMap(
            self.num_tokens,
            self.num_rows,
            self.tokens_per_row,
            move(self.index),
            move(self.order),
            move(self.offsets),
        )

    def expand(self, rows: Tensor) -> Tensor:
        """``rows`` ``[R, ...]`` gathered per token, ``[N, ...]``. For references and tests."""
        if self.index is None:
            return rows.repeat_interleave(self.tokens_per_row, dim=0)
        return rows.index_select(0, self.index.long())
