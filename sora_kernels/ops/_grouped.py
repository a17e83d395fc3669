"""Triton pieces of the deterministic grouped reduction behind row-indexed modulation gradients.

Tokens, sorted by row, are cut into fixed blocks, one program each. Within a block a running sum is
kept; when the row changes it is flushed: straight to the result if the whole row lies in this
block, else to one of the block's two partial slots (0 "head": the row began in an earlier block,
1 "tail": it goes on into the next). A second kernel adds, for each row that spans blocks, its tail
and then its heads. No atomics; the order of summation depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
from ._config import finish_tile
from ._launch import SIZES, cdiv, launch


@triton.jit
def round_if(value, LAW: tl.constexpr, POINT: tl.constexpr, dtype: tl.constexpr):
    """The value rounded to the storage dtype if the law has this point (laws.py)."""
    if POINT & LAW:  # this order: the interpreter leaves a global constexpr wrapped
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def token_offset(n, per_batch, batch_stride, token_stride):
    """Element offset of token n of a [B, L, D] tensor, in int64; the division is one of int32.
    `per_batch` is L, or None (`_launch.per_batch`): nothing to divide."""
    if per_batch is None:
        offset = n.to(tl.int64) * token_stride
    else:
        batch = n.to(tl.int32) // per_batch
        token = n.to(tl.int32) - batch * per_batch
        offset = batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    return offset


@triton.jit
def row_of(n, index_ptr, tokens_per_row):
    """Modulation row of token n. Tokens, rows and positions are int32 (there are fewer than 2^31):
    half the registers of int64, which only offsets are."""
    if index_ptr is not None:
        row = tl.load(index_ptr + n)
    else:
        row = n // tokens_per_row
    return row


@triton.jit
def rows_of(n, index_ptr, tokens_per_row, inside):
    """Modulation rows of a block of tokens, some of which may lie outside."""
    if index_ptr is not None:
        rows = tl.load(index_ptr + n, mask=inside, other=0).to(tl.int64)
    else:
        rows = tl.where(inside, n, 0) // tokens_per_row
    return rows


@triton.jit
def sorted_token(position, order_ptr):
    """The token at a sorted position."""
    n = position
    if order_ptr is not None:
        n = tl.load(order_ptr + position)
    return n


@triton.jit
def row_bounds(row, offsets_ptr, tokens_per_row):
    """First and one-past-last sorted position of a row."""
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + row)
        last = tl.load(offsets_ptr + row + 1)
    else:
        first = row * tokens_per_row
        last = first + tokens_per_row
    return first, last


@triton.jit
def run_at(
    position, end, order_ptr, index_ptr, offsets_ptr, tokens_per_row, GROUPED: tl.constexpr
):  # fmt: skip
    """The row of the sorted token at `position`, and where its tokens end within the block.
    Without modulations (not GROUPED) the whole block is one run."""
    row = position * 0
    stop = end
    if GROUPED:
        row = row_of(sorted_token(position, order_ptr), index_ptr, tokens_per_row)
        _, last = row_bounds(row, offsets_ptr, tokens_per_row)
        stop = tl.minimum(last, end)
    return row, tl.maximum(stop, position + 1)  # damaged offsets must not hang a GPU


@triton.jit
def flush(total, row, first, last, start, end, block, grad_ptr, partial_ptr, width, cols, mask):
    """Stores the running sum of one row where stage two will look for it."""
    whole = (first >= start) & (last <= end)
    slot = tl.where(first < start, 0, 1)
    tl.store(grad_ptr + row.to(tl.int64) * width + cols, total, mask=mask & whole)
    partial = partial_ptr + (block * 2 + slot).to(tl.int64) * width + cols
    tl.store(partial, total, mask=mask & (whole == 0))


@triton.jit
def flush_four(
    a, b, c, d, a_ptr, b_ptr, c_ptr, d_ptr, row, offsets_ptr, tokens_per_row, start, end, block,
    partial_ptr, share, width, cols, mask,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`flush` of up to four sums; the partials of each gradient take `share` elements.

    Looks up the row's bounds again: they would cost the loop before it registers."""
    first, last = row_bounds(row, offsets_ptr, tokens_per_row)
    if A:
        flush(a, row, first, last, start, end, block, a_ptr, partial_ptr, width, cols, mask)
    if B:
        flush(b, row, first, last, start, end, block, b_ptr, partial_ptr + share, width, cols,
              mask)  # fmt: skip
    if C:
        flush(c, row, first, last, start, end, block, c_ptr, partial_ptr + 2 * share, width, cols,
              mask)  # fmt: skip
    if D:
        flush(d, row, first, last, start, end, block, d_ptr, partial_ptr + 3 * share, width, cols,
              mask)  # fmt: skip


@triton.jit
def _finish_row(
    partial_ptr, offsets_ptr, grad_ptr, width, tokens_per_row, block_tokens,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad[row] = tail of its first block + heads of the others; rows without tokens get zero."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < width
    first, last = row_bounds(row, offsets_ptr, tokens_per_row)
    first_block = first // block_tokens
    last_block = tl.maximum(last - 1, 0) // block_tokens
    if (last == first) | (last_block > first_block):
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        if last > first:
            for b in range(first_block, last_block + 1, BLOCK_B):
                blocks = b + tl.arange(0, BLOCK_B)
                slots = tl.where(blocks == first_block, 1, 0)
                offsets = (blocks * 2 + slots).to(tl.int64)[:, None] * width + cols[None, :]
                inside = (blocks <= last_block)[:, None] & mask[None, :]
                total += tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), axis=0)
        tl.store(grad_ptr + row.to(tl.int64) * width + cols, total, mask=mask)


@triton.jit(**SIZES)
def _finish_rows_kernel(
    partial_ptr,  # [gradients, blocks, 2, D] fp32
    offsets_ptr,  # [R + 1] or None
    a_ptr,  # [R, D] or None, like the next three
    b_ptr,
    c_ptr,
    d_ptr,
    share,  # elements of one gradient's partials
    width,
    tokens_per_row,
    block_tokens,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One gradient of one row and some columns a program: `_finish_row`."""
    which = tl.program_id(2)
    partial_ptr += which.to(tl.int64) * share
    if a_ptr is not None:
        if which == 0:
            _finish_row(partial_ptr, offsets_ptr, a_ptr, width, tokens_per_row, block_tokens,
                        BLOCK_B, BLOCK_D)  # fmt: skip
    if b_ptr is not None:
        if which == 1:
            _finish_row(partial_ptr, offsets_ptr, b_ptr, width, tokens_per_row, block_tokens,
                        BLOCK_B, BLOCK_D)  # fmt: skip
    if c_ptr is not None:
        if which == 2:
            _finish_row(partial_ptr, offsets_ptr, c_ptr, width, tokens_per_row, block_tokens,
                        BLOCK_B, BLOCK_D)  # fmt: skip
    if d_ptr is not None:
        if which == 3:
            _finish_row(partial_ptr, offsets_ptr, d_ptr, width, tokens_per_row, block_tokens,
                        BLOCK_B, BLOCK_D)  # fmt: skip


def new_partials(
    grads: Sequence[Tensor], index: Tensor | None, tokens_per_row: int, blocks: int, width: int
) -> Tensor:
    """Memory for the partials of `grads`, empty where every row lies within one block."""
    spans = (index is not None or tokens_per_row != 1) and any(g.numel() > 0 for g in grads)
    shape = (len(grads) if spans else 0, blocks, 2, width)
    return grads[0].new_empty(shape, dtype=torch.float32)


def finish_rows(
    grads: Sequence[Tensor],
    partials: Tensor,
    offsets: Tensor | None,
    tokens_per_row: int,
    block_tokens: int,
) -> None:
    """Stage two of up to four gradients ``[R, D]`` (or empty), from `new_partials`."""
    if partials.shape[0] == 0:
        return
    count, blocks, _, width = partials.shape
    num_rows = max(len(g) for g in grads if g.numel() > 0)
    block_b, block_d = finish_tile(blocks, num_rows)
    pointers = [g if g.numel() > 0 else None for g in grads]
    launch(
        _finish_rows_kernel,
        (num_rows, cdiv(width, block_d), count),
        partials.device,
        partials,
        offsets,
        *pointers,
        *[None] * (4 - count),
        blocks * 2 * width,
        width,
        tokens_per_row,
        block_tokens,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=block_b * block_d // 512,
        num_stages=1,
        enable_fp_fusion=True,
    )


def finish_case() -> AotCase:
    """shift and scale of 8 rows, 1024 blocks."""
    block_b, block_d = finish_tile(1024, 8)
    pointers = {"partial_ptr": "*fp32", "offsets_ptr": "*i32", "a_ptr": "*bf16", "b_ptr": "*bf16"}
    sizes = ("share", "width", "tokens_per_row", "block_tokens")
    return AotCase(
        name="finish_rows",
        kernel=_finish_rows_kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32")},
        constexprs={"c_ptr": None, "d_ptr": None, "BLOCK_B": block_b, "BLOCK_D": block_d},
        num_warps=block_b * block_d // 512,
        memory_bound=True,
        narrow_store_ok=True,
        divisible=(*pointers, "share", "width"),
    )
