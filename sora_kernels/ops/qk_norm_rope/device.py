"""Device functions of ``qk_norm_rope``: pairs of components, their angles, row sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ...laws import Point
from .._grid import position_rows
from .raw import Norm, Pairing

XHAT = tl.constexpr(int(Point.XHAT))
BEFORE_ROPE = tl.constexpr(int(Point.AFFINE | Point.PRE_ROPE))
ROPE = tl.constexpr(int(Point.ROPE))
LAYER = tl.constexpr(int(Norm.LAYER))
RMS_FULL = tl.constexpr(int(Norm.RMS_FULL))
INTERLEAVED = tl.constexpr(int(Pairing.INTERLEAVED))
HALF = tl.constexpr(int(Pairing.HALF))


@triton.jit
def round_at(x, POINT: tl.constexpr, LAW: tl.constexpr, dtype: tl.constexpr):
    if POINT & LAW:  # in this order: an int in the interpreter knows no constexpr
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def packed_row(index_ptr, token, token_mask):
    """Row of a token in the packed sequence: looked up if it is one stream of several."""
    if index_ptr is None:
        return token
    else:
        return tl.load(index_ptr + token, mask=token_mask, other=0)


@triton.jit
def row_offsets(row, head, length, stride_b, stride_t, stride_h, UNIT: tl.constexpr):
    """Element offsets [T, HEADS, 1] of rows and heads, in int64; strides are in units of UNIT.

    ``length`` is that of a batch entry, None where there is one only: nothing to divide then.
    Rows are int32, or int64 where they were looked up.
    """
    if length is None:
        at = row.to(tl.int64) * stride_t * UNIT
    else:
        batch = row // length
        token = row - batch * length
        at = (batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t) * UNIT
    return at[:, None, None] + (head.to(tl.int64) * stride_h * UNIT)[None, :, None]


@triton.jit
def columns(j, D: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
             R2: tl.constexpr, PAIRING: tl.constexpr):  # fmt: skip
    """Components (a, b) of pair j, unless interleaved. The rest is paired as one more half."""
    rest = j >= R2
    if PAIRING == HALF:
        return tl.where(rest, j + R2, j), tl.where(rest, j + D // 2, j + R2)
    # Axis slice [2 * start, 2 * end): a = 2 * start + (j - start), b = a + (end - start).
    start = tl.where(j >= B3, B3, tl.where(j >= B2, B2, tl.where(j >= B1, B1, 0)))
    end = tl.where(j >= B3, R2, tl.where(j >= B2, B3, tl.where(j >= B1, B2, B1)))
    return tl.where(rest, j + R2, j + start), tl.where(rest, j + D // 2, j + end)


@triton.jit
def load_pairs(ptr, base, mask, col_a, col_b, D: tl.constexpr, PAIRS: tl.constexpr,
                PAIRING: tl.constexpr):  # fmt: skip
    """Rows at ptr + base [T, H, 1] as fp32 components a, b [T, H, PAIRS]; 0 where masked."""
    if PAIRING == INTERLEAVED:
        # Load whole rows (16 bytes per thread); splitting neighbours costs no data movement.
        col = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.load(ptr + base + col, mask=mask & (col < D), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], PAIRS, 2]))
    else:
        valid = mask & (tl.arange(0, PAIRS) < D // 2)[None, None, :]
        a = tl.load(ptr + base + col_a[None, None, :], mask=valid, other=0.0).to(tl.float32)
        b = tl.load(ptr + base + col_b[None, None, :], mask=valid, other=0.0).to(tl.float32)
        return a, b


@triton.jit
def store_pairs(ptr, base, mask, a, b, col_a, col_b, D: tl.constexpr, PAIRS: tl.constexpr,
                 PAIRING: tl.constexpr):  # fmt: skip
    if PAIRING == INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * PAIRS])
        tl.store(ptr + base + col, x.to(ptr.dtype.element_ty), mask=mask & (col < D))
    else:
        valid = mask & (tl.arange(0, PAIRS) < D // 2)[None, None, :]
        tl.store(ptr + base + col_a[None, None, :], a.to(ptr.dtype.element_ty), mask=valid)
        tl.store(ptr + base + col_b[None, None, :], b.to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def table_rows(pos_ptr, parts_ptr, part_size, first_token, token, token_mask, j, rope_len,
                B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
                NUM_POS: tl.constexpr):  # fmt: skip
    """The row that column j of the tables is read from, [T, PAIRS] (or [T, 1])."""
    token = token % rope_len
    if NUM_POS == 0:
        row_t, row_h, row_w = position_rows(pos_ptr, parts_ptr, part_size, first_token, token,
                                            token_mask)  # fmt: skip
        row = tl.where(j[None, :] >= B1, row_h[:, None], row_t[:, None])
        return tl.where(j[None, :] >= B2, row_w[:, None], row)
    at = pos_ptr + token.to(tl.int64) * NUM_POS
    row = tl.load(at, mask=token_mask, other=0)[:, None] + tl.zeros_like(j)[None, :]
    if NUM_POS > 1:
        row_1 = tl.load(at + 1, mask=token_mask, other=0)[:, None]
        row = tl.where(j[None, :] >= B1, row_1, row)
    if NUM_POS > 2:
        row_2 = tl.load(at + 2, mask=token_mask, other=0)[:, None]
        row = tl.where(j[None, :] >= B2, row_2, row)
    if NUM_POS > 3:
        row_3 = tl.load(at + 3, mask=token_mask, other=0)[:, None]
        row = tl.where(j[None, :] >= B3, row_3, row)
    return row


@triton.jit
def angles(cos_ptr, sin_ptr, pos_ptr, parts_ptr, part_size, first_token, token, token_mask, head, j,
            rope_len, H: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
            R2: tl.constexpr, NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """cos and sin [T, 1 or HEADS, PAIRS] of packed rows ``token``.

    NUM_POS: columns of position_index at ``pos_ptr``, one per axis or one for all. 0: it is
    part_of_token instead, and the rows follow from ``parts_ptr``.
    """
    row = table_rows(pos_ptr, parts_ptr, part_size, first_token, token, token_mask, j, rope_len,
                     B1, B2, B3, NUM_POS)  # fmt: skip
    offset = row[:, None, :].to(tl.int64)
    mask = token_mask[:, None, None] & (j < R2)[None, None, :]
    if PER_HEAD:
        offset = (offset * H + head[None, :, None]) * R2 + j[None, None, :]
        mask = mask & (head < H)[None, :, None]
    else:
        offset = offset * R2 + j[None, None, :]
    cos = tl.load(cos_ptr + offset, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + offset, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def row_sum(x, NORM: tl.constexpr):
    """Sum over the components a norm runs over, kept as [T, HEADS or 1, 1]."""
    s = tl.sum(x, axis=2, keep_dims=True)
    if NORM == RMS_FULL:
        s = tl.sum(s, axis=1, keep_dims=True)
    return s


@triton.jit
def normalise(a, b, mask, j, eps, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """(a, b) -> normalised (a, b) and rstd. What lies outside ``mask`` [T, HEADS, 1] stays 0."""
    if NORM == LAYER:
        valid = mask & (j < D // 2)[None, None, :]
        mean = row_sum(a + b, NORM) / D
        a = tl.where(valid, a - mean, 0.0)
        b = tl.where(valid, b - mean, 0.0)
    count = D * H if NORM == RMS_FULL else D
    rstd = tl.rsqrt(row_sum(a * a + b * b, NORM) / count + eps)
    rstd = tl.where(mask, rstd, 0.0)  # eps may be 0
    return a * rstd, b * rstd, rstd


@triton.jit
def token_sum(x, FULL: tl.constexpr):
    s = tl.sum(x, axis=0, keep_dims=True)
    if not FULL:
        s = tl.sum(s, axis=1, keep_dims=True)
    return s
