"""Triton pieces of the deterministic grouped reduction behind row-indexed modulation gradients.

Tokens, sorted by row, are cut into fixed blocks, one program each. Within a block a running sum is
kept; when the row changes it is flushed: straight to the result if the whole row lies in this
block, else to one of the block's two partial slots (0 "head": the row began in an earlier block,
1 "tail": it goes on into the next). A second kernel adds, for each row that spans blocks, its tail
and then its heads. No atomics; the order of summation depends on shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rows import RowMap
from ._launch import launch


@triton.jit
def round_if(value, LAW: tl.constexpr, POINT: tl.constexpr, dtype: tl.constexpr):
    """The value rounded to the storage dtype if the law has this point (laws.py)."""
    if POINT & LAW:  # this order: the interpreter leaves a global constexpr wrapped
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def token_offset(n, per_batch, batch_stride, token_stride):
    """Element offset of token n of a [B, L, D] tensor; all arithmetic in int64."""
    n = n.to(tl.int64)
    return (n // per_batch) * batch_stride + (n % per_batch) * token_stride


@triton.jit
def row_of(n, index_ptr, tokens_per_row):
    """Modulation row of token n."""
    if index_ptr is not None:
        row = tl.load(index_ptr + n).to(tl.int64)
    else:
        row = (n // tokens_per_row).to(tl.int64)
    return row


@triton.jit
def row_bounds(row, offsets_ptr, tokens_per_row):
    """First and one-past-last sorted position of a row."""
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + row).to(tl.int64)
        last = tl.load(offsets_ptr + row + 1).to(tl.int64)
    else:
        first = row * tokens_per_row
        last = first + tokens_per_row
    return first, last


@triton.jit
def flush(total, row, first, last, start, end, block, grad_ptr, partial_ptr, width, cols, mask):
    """Stores the running sum of one row where stage two will look for it."""
    whole = (first >= start) & (last <= end)
    slot = tl.where(first < start, 0, 1)
    tl.store(grad_ptr + row * width + cols, total, mask=mask & whole)
    partial = partial_ptr + (block * 2 + slot) * width + cols
    tl.store(partial, total, mask=mask & (whole == 0))


@triton.jit
def _finish_rows_kernel(
    partial_ptr,  # [blocks, 2, D] fp32
    offsets_ptr,  # [R + 1] or None
    grad_ptr,  # [R, D]
    width,
    tokens_per_row,
    block_tokens,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad[row] = tail of its first block + heads of the others; rows without tokens get zero."""
    row = tl.program_id(0).to(tl.int64)
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
                offsets = (blocks * 2 + slots)[:, None] * width + cols[None, :]
                inside = (blocks <= last_block)[:, None] & mask[None, :]
                total += tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), axis=0)
        tl.store(grad_ptr + row * width + cols, total, mask=mask)


def finish_rows(grad: Tensor, partial: Tensor, rows: RowMap, block_tokens: int) -> None:
    """Stage two for one gradient ``[R, D]``, given its partials ``[blocks, 2, D]``."""
    num_rows, width = grad.shape
    if rows.tokens_per_row == 1 or num_rows == 0:
        return  # every row lies within one block
    block_d = 128
    launch(
        _finish_rows_kernel,
        (num_rows, triton.cdiv(width, block_d)),
        grad.device,
        partial,
        rows.offsets,
        grad,
        width,
        rows.tokens_per_row,
        block_tokens,
        BLOCK_B=16,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
