"""Windowed attention on the CPU: PyTorch's flash kernel on groups of tiles, no mask.

Query tiles that see the same keys form a group (a clamped window makes those at the borders share,
a window over the whole grid makes all of them one group); groups of equal sizes run as one batch.
A group's keys are few contiguous runs: one is read in place, several are copied side by side, which
costs one pass over them where the product makes one per query row. What no window holds is never
touched. Reading the table of a CPU tensor waits for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing.windows import SegmentGrid, TokenRange, Window, merged, seen_ranges
from ..packed_attention.checks import host_lengths
from ..packed_attention.cpu import SHORT, _fold_dlse

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

GATHERED = 1 << 23
"""Bytes of keys and values copied side by side for one batch, unless one group has more."""


class _Group(NamedTuple):
    """Queries that see the same keys, both as sorted ranges of tokens of the segment."""

    queries: tuple[TokenRange, ...]
    keys: tuple[TokenRange, ...]

    def shifted(self, by: int) -> _Group:
        return _Group(
            *(tuple((first + by, stop + by) for first, stop in ranges) for ranges in self)
        )


class _Batch(NamedTuple):
    """`size` groups of `len_q` queries and `len_k` keys, their ranges one after another."""

    size: int
    len_q: int
    len_k: int
    queries: tuple[TokenRange, ...]
    keys: tuple[TokenRange, ...]


def _length(ranges: Sequence[TokenRange]) -> int:
    return sum(stop - first for first, stop in ranges)


def _joined(ranges: Sequence[TokenRange]) -> tuple[TokenRange, ...]:
    """Neighbours in the list that touch as one range; the order stays."""
    joined: list[TokenRange] = []
    for first, stop in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((first, stop))
    return tuple(joined)


@lru_cache(maxsize=256)
def segment_groups(grid: SegmentGrid, window: Window) -> tuple[_Group, ...]:
    """The groups of a segment. Every token is a query of exactly one of them."""
    pieces = [(number, grid.tile_tokens(number)) for number in range(_tiles(grid))]
    outside = [(0, grid.start), (grid.stop, grid.length)]
    pieces += [(-1, (first, stop)) for first, stop in outside if stop > first]
    groups: dict[tuple[TokenRange, ...], list[TokenRange]] = {}
    for number, piece in pieces:
        keys = tuple(merged(seen_ranges(grid, number, window)))
        groups.setdefault(keys, []).append(piece)
    return tuple(_Group(tuple(merged(queries)), keys) for keys, queries in groups.items())


def _tiles(grid: SegmentGrid) -> int:
    t, h, w = grid.counts
    return t * h * w if grid.stop > grid.start else 0


@lru_cache(maxsize=64)
def pack_batches(
    lengths: tuple[int, ...], table: tuple[tuple[int, ...], ...], window: Window, most: int
) -> tuple[_Batch, ...]:
    """The batches of a pack: groups of equal sizes together, at most `most` copied keys in each.

    Args:
        lengths: tokens of each segment.
        table: rows of `PackedLayout.window_table`.
    """
    alike: dict[tuple[int, int, bool], list[_Group]] = {}
    start = 0
    for length, row in zip(lengths, table, strict=True):
        grid = SegmentGrid(length, row[0], (row[1], row[2], row[3]), (row[4], row[5], row[6]))
        for group in segment_groups(grid, window) if length else ():
            sizes = (_length(group.queries), _length(group.keys), len(group.keys) == 1)
            alike.setdefault(sizes, []).append(group.shifted(start))
        start += length
    batches: list[_Batch] = []
    for (len_q, len_k, in_place), groups in alike.items():
        run: list[_Group] = []
        for group in groups:
            if run:
                follows = run[-1].keys[-1][1] == group.keys[0][0]
                follows &= len(group.queries) == 1 and run[-1].queries[-1][1] == group.queries[0][0]
                full = not follows if in_place else (len(run) + 1) * len_k > most
                if full:
                    batches.append(_batch(run, len_q, len_k))
                    run = []
            run.append(group)
        batches.append(_batch(run, len_q, len_k))
    return tuple(batches)


def _batch(groups: Sequence[_Group], len_q: int, len_k: int) -> _Batch:
    queries = _joined([pair for group in groups for pair in group.queries])
    keys = _joined([pair for group in groups for pair in group.keys])
    return _Batch(len(groups), len_q, len_k, queries, keys)


def _plan(
    k: Tensor, cu_seqlens: Tensor, table: Tensor, window: Sequence[int]
) -> tuple[_Batch, ...]:
    lengths = tuple(host_lengths("layout", cu_seqlens, k.shape[0]))
    most = GATHERED // (2 * k.shape[1] * k.shape[2] * k.element_size())
    rows = tuple(map(tuple, table.tolist()))
    return pack_batches(lengths, rows, Window.from_ints(window), most)


def _gather(x: Tensor, ranges: Sequence[TokenRange], batch: int) -> Tensor:
    """Rows of `[N, H, D]` as `[B, H, L, D]`: a view of one range, else a copy."""
    if len(ranges) == 1:
        rows = x[ranges[0][0] : ranges[0][1]]
    else:
        rows = torch.cat([x[first:stop] for first, stop in ranges])
    return rows.unflatten(0, (batch, -1)).transpose(1, 2)


def _gather_lse(lse: Tensor, ranges: Sequence[TokenRange], batch: int) -> Tensor:
    """Columns of `[H, N]` as `[B, H, L]`."""
    if len(ranges) == 1:
        columns = lse[:, ranges[0][0] : ranges[0][1]]
    else:
        columns = torch.cat([lse[:, first:stop] for first, stop in ranges], 1)
    return columns.unflatten(1, (batch, -1)).transpose(0, 1)


def _rows(part: Tensor) -> Tensor:
    """`[B, H, L, D]` as rows `[B * L, H, D]`."""
    return part.transpose(1, 2).flatten(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, table: Tensor, work: Tensor | None,
    window: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    for size, _, _, queries, keys in _plan(k, cu_seqlens, table, window):
        part, part_lse = _forward(
            _gather(q, queries, size), _gather(k, keys, size), _gather(v, keys, size),
            0.0, False, attn_mask=None, scale=scale,
        )  # fmt: skip
        rows, columns = _rows(part), part_lse.transpose(0, 1).flatten(1)
        at = 0
        for first, stop in queries:
            out[first:stop].copy_(rows[at : at + stop - first])
            lse[:, first:stop].copy_(columns[:, at : at + stop - first])
            at += stop - first
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, table: Tensor, work_dq: Tensor | None, work_dkv: Tensor | None,
    window: Sequence[int], scale: float, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head_dim = q.shape[-1]
    batches = _plan(k, cu_seqlens, table, window)
    dq = q.new_empty(q.shape)
    # A key gets one term from each group that sees it, always in the order of the groups.
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    if dlse is not None:
        q, k, v, out, dout = _fold_dlse(dlse, q, k, v, out, dout)
    for size, _, len_k, queries, keys in batches:
        ranges = (queries, queries, keys, keys, queries)
        given = [_gather(x, r, size) for x, r in zip((dout, q, k, v, out), ranges, strict=True)]
        if len_k <= SHORT:
            given = [x.float() for x in given]
        parts = _backward(
            *given, _gather_lse(lse, queries, size), 0.0, False, attn_mask=None, scale=scale
        )
        dq_rows, dk_rows, dv_rows = (_rows(part[..., :head_dim]) for part in parts)
        at = 0
        for first, stop in queries:
            dq[first:stop].copy_(dq_rows[at : at + stop - first])
            at += stop - first
        at = 0
        for first, stop in keys if need_dkv else ():
            dk[first:stop].add_(dk_rows[at : at + stop - first])
            dv[first:stop].add_(dv_rows[at : at + stop - first])
            at += stop - first
    return (
        dq if need_dq else q.new_empty(0),
        dk.to(k.dtype) if need_dkv else k.new_empty(0),
        dv.to(v.dtype) if need_dkv else v.new_empty(0),
    )
