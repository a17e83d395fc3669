"""Triton kernels of ``qk_norm_rope`` and their launchers. The formula is in ``reference.py``.

One program owns a tile of tokens x heads x components of q *or* of k (``program_id(1)`` runs over
the head blocks of q, then over those of k). A tile is held as the two components of every pair,
``a`` and ``b`` of ``[TOKENS, HEADS, PAIRS]``, so that the rotation is register arithmetic. Pairs
at and after r/2 are the components that are not rotated: their cos is 1 and their sin is 0. cos and
sin are read once per token and shared by its heads.
"""

from __future__ import annotations

from itertools import accumulate
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...laws import Point
from . import MAX_AXES, Need, Norm, Pairing, new_gradients
from .config import Config, backward_steps, tile

if TYPE_CHECKING:
    from ...aot import AotCase

_XHAT = tl.constexpr(int(Point.XHAT))
_BEFORE_ROPE = tl.constexpr(int(Point.AFFINE | Point.PRE_ROPE))
_ROPE = tl.constexpr(int(Point.ROPE))
_LAYER = tl.constexpr(int(Norm.LAYER))
_RMS_FULL = tl.constexpr(int(Norm.RMS_FULL))
_INTERLEAVED = tl.constexpr(int(Pairing.INTERLEAVED))
_HALF = tl.constexpr(int(Pairing.HALF))


# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _round(x, POINT: tl.constexpr, LAW: tl.constexpr, dtype: tl.constexpr):
    if POINT & LAW:  # in this order: an int in the interpreter knows no constexpr
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _columns(j, D: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
             R2: tl.constexpr, PAIRING: tl.constexpr):  # fmt: skip
    """Components (a, b) of pair j, unless interleaved. The rest is paired as one more half."""
    rest = j >= R2
    if PAIRING == _HALF:
        return tl.where(rest, j + R2, j), tl.where(rest, j + D // 2, j + R2)
    # Axis slice [2 * start, 2 * end): a = 2 * start + (j - start), b = a + (end - start).
    start = tl.where(j >= B3, B3, tl.where(j >= B2, B2, tl.where(j >= B1, B1, 0)))
    end = tl.where(j >= B3, R2, tl.where(j >= B2, B3, tl.where(j >= B1, B2, B1)))
    return tl.where(rest, j + R2, j + start), tl.where(rest, j + D // 2, j + end)


@triton.jit
def _load_pairs(ptr, base, mask, col_a, col_b, D: tl.constexpr, PAIRS: tl.constexpr,
                PAIRING: tl.constexpr):  # fmt: skip
    """Rows at ptr + base [T, H, 1] as fp32 components a, b [T, H, PAIRS]; 0 where masked."""
    if PAIRING == _INTERLEAVED:
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
def _store_pairs(ptr, base, mask, a, b, col_a, col_b, D: tl.constexpr, PAIRS: tl.constexpr,
                 PAIRING: tl.constexpr):  # fmt: skip
    if PAIRING == _INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * PAIRS])
        tl.store(ptr + base + col, x.to(ptr.dtype.element_ty), mask=mask & (col < D))
    else:
        valid = mask & (tl.arange(0, PAIRS) < D // 2)[None, None, :]
        tl.store(ptr + base + col_a[None, None, :], a.to(ptr.dtype.element_ty), mask=valid)
        tl.store(ptr + base + col_b[None, None, :], b.to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def _angles(cos_ptr, sin_ptr, pos_ptr, token, token_mask, head, j, rope_len, H: tl.constexpr,
            B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
            NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """cos and sin [T, 1 or HEADS, PAIRS]: row position_index[token, axis of j] of column j."""
    at = pos_ptr + (token % rope_len) * NUM_POS
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
def _row_sum(x, NORM: tl.constexpr):
    """Sum over the components a norm runs over, kept as [T, HEADS or 1, 1]."""
    s = tl.sum(x, axis=2, keep_dims=True)
    if NORM == _RMS_FULL:
        s = tl.sum(s, axis=1, keep_dims=True)
    return s


@triton.jit
def _normalise(a, b, mask, j, eps, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """(a, b) -> normalised (a, b) and rstd. What lies outside ``mask`` [T, HEADS, 1] stays 0."""
    if NORM == _LAYER:
        valid = mask & (j < D // 2)[None, None, :]
        mean = _row_sum(a + b, NORM) / D
        a = tl.where(valid, a - mean, 0.0)
        b = tl.where(valid, b - mean, 0.0)
    count = D * H if NORM == _RMS_FULL else D
    rstd = tl.rsqrt(_row_sum(a * a + b * b, NORM) / count + eps)
    rstd = tl.where(mask, rstd, 0.0)  # eps may be 0
    return a * rstd, b * rstd, rstd


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr,
    cos_ptr, sin_ptr, pos_ptr, yq_ptr, yk_ptr,
    n_q, n_k, q_len, k_len, rope_len,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """y = rotate(norm(x) * weight + bias). Strides are in units of UNIT elements."""
    q_blocks: tl.constexpr = (HQ + HEADS - 1) // HEADS
    if tl.program_id(1) < q_blocks:
        _fwd_tile(
            q_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, pos_ptr, yq_ptr, tl.program_id(1),
            n_q, q_len, rope_len, q_stride_b, q_stride_t, q_stride_h, eps,
            HQ, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, NORM, PAIRING, LAW,
            Q_WEIGHT, Q_BIAS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip
    else:
        _fwd_tile(
            k_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, pos_ptr, yk_ptr,
            tl.program_id(1) - q_blocks,
            n_k, k_len, rope_len, k_stride_b, k_stride_t, k_stride_h, eps,
            HK, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, NORM, PAIRING, LAW,
            K_WEIGHT, K_BIAS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip


@triton.jit
def _fwd_tile(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, pos_ptr, y_ptr, head_block,
    n, length, rope_len, stride_b, stride_t, stride_h, eps,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    j = tl.arange(0, PAIRS)
    col_a, col_b = _columns(j, D, B1, B2, B3, R2, PAIRING)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = head_block * HEADS + tl.arange(0, HEADS)
    token_mask = token < n
    mask = token_mask[:, None, None] & (head < H)[None, :, None]

    x_at = (token // length) * (stride_b * UNIT) + (token % length) * (stride_t * UNIT)
    x_at = x_at[:, None, None] + (head * (stride_h * UNIT))[None, :, None]
    a, b = _load_pairs(x_ptr, x_at, mask, col_a, col_b, D, PAIRS, PAIRING)  # [T, H, D/2]
    if NORM:
        a, b, rstd = _normalise(a, b, mask, j, eps, H, D, NORM)
        a, b = _round(a, _XHAT, LAW, dtype), _round(b, _XHAT, LAW, dtype)
        full: tl.constexpr = NORM == _RMS_FULL
        w_at = (head * D)[None, :, None] if full else tl.zeros([1, 1, 1], tl.int32)
        w_mask = (head < H)[None, :, None] if full else tl.full([1, 1, 1], True, tl.int1)
        if WEIGHT:
            wa, wb = _load_pairs(weight_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b = a * wa, b * wb
        if BIAS:
            ba, bb = _load_pairs(bias_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b = a + ba, b + bb
        a, b = _round(a, _BEFORE_ROPE, LAW, dtype), _round(b, _BEFORE_ROPE, LAW, dtype)
    if R2 > 0:
        cos, sin = _angles(cos_ptr, sin_ptr, pos_ptr, token, token_mask, head, j, rope_len,
                           H, B1, B2, B3, R2, NUM_POS, PER_HEAD)  # fmt: skip
        cos, sin = _round(cos, _ROPE, LAW, dtype), _round(sin, _ROPE, LAW, dtype)
        ac, bs = _round(a * cos, _ROPE, LAW, dtype), _round(b * sin, _ROPE, LAW, dtype)
        bc, as_ = _round(b * cos, _ROPE, LAW, dtype), _round(a * sin, _ROPE, LAW, dtype)
        a, b = ac - bs, bc + as_
    y_at = (token * (H * D))[:, None, None] + (head * D)[None, :, None]
    _store_pairs(y_ptr, y_at, mask, a, b, col_a, col_b, D, PAIRS, PAIRING)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr,
    dq_ptr, dk_ptr, q_partial_ptr, k_partial_ptr,
    first_block, n_q, n_k, q_len, k_len, rope_len,
    dyq_stride_b, dyq_stride_t, dyq_stride_h, dyk_stride_b, dyk_stride_t, dyk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr,
    DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """dx, and per program one row of partial dweight and dbias; see ``_bwd_tiles``."""
    q_blocks: tl.constexpr = (HQ + HEADS - 1) // HEADS
    block = tl.program_id(1) + first_block
    if block < q_blocks:
        _bwd_tiles(
            dyq_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, pos_ptr, dq_ptr, q_partial_ptr,
            block, q_blocks, n_q, q_len, rope_len, dyq_stride_b, dyq_stride_t, dyq_stride_h,
            q_stride_b, q_stride_t, q_stride_h, eps,
            HQ, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, NORM, PAIRING, LAW,
            Q_WEIGHT, DX, DW, DB, STEPS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip
    else:
        k_blocks: tl.constexpr = (HK + HEADS - 1) // HEADS
        _bwd_tiles(
            dyk_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, dk_ptr, k_partial_ptr,
            block - q_blocks, k_blocks, n_k, k_len, rope_len,
            dyk_stride_b, dyk_stride_t, dyk_stride_h, k_stride_b, k_stride_t, k_stride_h, eps,
            HK, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, NORM, PAIRING, LAW,
            K_WEIGHT, DX, DW, DB, STEPS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip


@triton.jit
def _bwd_tiles(
    dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, pos_ptr, dx_ptr, partial_ptr,
    head_block, head_blocks: tl.constexpr, n, length, rope_len,
    dy_stride_b, dy_stride_t, dy_stride_h, stride_b, stride_t, stride_h, eps,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    WEIGHT: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """With du = rotate(dy, -theta) and g = du * weight:

        dx = rstd * (g - [mean(g)] - xhat * mean(g * xhat))     [] for the LayerNorm
        dweight = sum_rows du * xhat,  dbias = sum_rows du      one partial row per program

    The statistics are recomputed from x, which is read anyway.
    """
    dtype = x_ptr.dtype.element_ty
    full: tl.constexpr = NORM == _RMS_FULL
    j = tl.arange(0, PAIRS)
    col_a, col_b = _columns(j, D, B1, B2, B3, R2, PAIRING)
    head = head_block * HEADS + tl.arange(0, HEADS)
    w_at = (head * D)[None, :, None] if full else tl.zeros([1, 1, 1], tl.int32)
    w_mask = (head < H)[None, :, None] if full else tl.full([1, 1, 1], True, tl.int1)
    dwa = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    dwb = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    dba = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    dbb = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    for step in tl.range(0, STEPS):
        tile = tl.program_id(0).to(tl.int64) * STEPS + step
        token = tile * TOKENS + tl.arange(0, TOKENS)
        token_mask = token < n
        mask = token_mask[:, None, None] & (head < H)[None, :, None]
        batch, within = token // length, token % length
        dy_at = batch * (dy_stride_b * UNIT) + within * (dy_stride_t * UNIT)
        dy_at = dy_at[:, None, None] + (head * (dy_stride_h * UNIT))[None, :, None]
        ga, gb = _load_pairs(dy_ptr, dy_at, mask, col_a, col_b, D, PAIRS, PAIRING)
        if R2 > 0:
            cos, sin = _angles(cos_ptr, sin_ptr, pos_ptr, token, token_mask, head, j, rope_len,
                               H, B1, B2, B3, R2, NUM_POS, PER_HEAD)  # fmt: skip
            cos, sin = _round(cos, _ROPE, LAW, dtype), _round(sin, _ROPE, LAW, dtype)
            ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
        if NORM:
            x_at = batch * (stride_b * UNIT) + within * (stride_t * UNIT)
            x_at = x_at[:, None, None] + (head * (stride_h * UNIT))[None, :, None]
            a, b = _load_pairs(x_ptr, x_at, mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b, rstd = _normalise(a, b, mask, j, eps, H, D, NORM)
            if DB:
                dba += ga
                dbb += gb
            if DW:
                dwa += ga * _round(a, _XHAT, LAW, dtype)
                dwb += gb * _round(b, _XHAT, LAW, dtype)
            if WEIGHT:
                wa, wb = _load_pairs(weight_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
                ga, gb = ga * wa, gb * wb
            if DX:
                count = D * H if full else D
                slope = _row_sum(ga * a + gb * b, NORM) / count
                offset = _row_sum(ga + gb, NORM) / count if NORM == _LAYER else 0.0
                ga = (ga - a * slope - offset) * rstd
                gb = (gb - b * slope - offset) * rstd
        if DX:
            dx_at = (token * (H * D))[:, None, None] + (head * D)[None, :, None]
            _store_pairs(dx_ptr, dx_at, mask, ga, gb, col_a, col_b, D, PAIRS, PAIRING)

    # Partials are [dweight, dbias] x programs x width; a fixed-order sum over programs follows.
    width: tl.constexpr = H * D if full else D
    rows = tl.num_programs(0).to(tl.int64) * head_blocks
    p_at = (tl.program_id(0).to(tl.int64) * head_blocks + head_block) * width + w_at
    if DW:
        dwa, dwb = _token_sum(dwa, full), _token_sum(dwb, full)
        _store_pairs(partial_ptr, p_at, w_mask, dwa, dwb, col_a, col_b, D, PAIRS, PAIRING)
    if DB:
        dba, dbb = _token_sum(dba, full), _token_sum(dbb, full)
        p_at += rows * width
        _store_pairs(partial_ptr, p_at, w_mask, dba, dbb, col_a, col_b, D, PAIRS, PAIRING)


@triton.jit
def _token_sum(x, FULL: tl.constexpr):
    s = tl.sum(x, axis=0, keep_dims=True)
    if not FULL:
        s = tl.sum(s, axis=1, keep_dims=True)
    return s


# --- launchers ----------------------------------------------------------------------------------


def _tokens(x: Tensor) -> tuple[int, int]:
    """(all tokens, tokens per batch entry)"""
    return (x.shape[0], x.shape[0]) if x.ndim == 3 else (x.shape[0] * x.shape[1], x.shape[1])


def _strides(x: Tensor) -> tuple[int, int, int]:
    return (0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3]  # type: ignore[return-value]


def _unit(*strides: tuple[int, int, int]) -> int:
    """Largest common power of two of the strides, up to 16.

    Triton knows that an argument is a multiple of 16 but not of 8, which a head of 72 bf16
    components needs for 16-byte accesses; so strides travel divided by this.
    """
    return gcd(16, *(s for group in strides for s in group))


def _rope_constants(axes: list[int], cos: Tensor | None, index: Tensor | None) -> dict[str, Any]:
    ends = list(accumulate(size // 2 for size in axes)) or [0]
    ends += [ends[-1]] * (MAX_AXES - len(ends))
    return {
        "B1": ends[0],
        "B2": ends[1],
        "B3": ends[2],
        "R2": ends[3],
        "NUM_POS": 1 if index is None else index.shape[1],
        "PER_HEAD": cos is not None and cos.ndim == 3,
    }


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_index: Tensor | None,
    axes: list[int],
    norm: int,
    eps: float,
    pairing: int,
    law: int,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; arguments as in the raw op's schema."""
    yq, yk = q.new_empty(q.shape), k.new_empty(k.shape)
    (n_q, q_len), (n_k, k_len) = _tokens(q), _tokens(k)
    hq, hk, width = q.shape[-2], k.shape[-2], q.shape[-1]
    cfg = tile(max(hq, hk), width, norm == Norm.RMS_FULL, backward=False)
    blocks = triton.cdiv(hq, cfg.heads) + triton.cdiv(hk, cfg.heads)
    grid = (triton.cdiv(max(n_q, n_k), cfg.tokens), blocks)
    if 0 in grid:
        return yq, yk
    strides = [_strides(q), _strides(k)]
    unit = _unit(*strides)
    _qk_norm_rope_fwd_kernel[grid](
        q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, position_index, yq, yk,
        n_q, n_k, max(q_len, 1), max(k_len, 1),
        1 if position_index is None else position_index.shape[0],
        *(s // unit for group in strides for s in group),
        eps,
        HQ=hq, HK=hk, D=width, UNIT=unit, **_rope_constants(axes, cos, position_index),
        NORM=norm, PAIRING=pairing, LAW=law & _POINTS,
        Q_WEIGHT=q_weight is not None, K_WEIGHT=k_weight is not None,
        Q_BIAS=q_bias is not None, K_BIAS=k_bias is not None,
        TOKENS=cfg.tokens, HEADS=cfg.heads, PAIRS=cfg.pairs,
        num_warps=cfg.num_warps, num_stages=1, enable_fp_fusion=law & _POINTS == 0,
    )  # fmt: skip
    return yq, yk


_POINTS = int(Point.XHAT | Point.AFFINE | Point.PRE_ROPE | Point.ROPE)


def backward(
    dyq: Tensor,
    dyk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_index: Tensor | None,
    axes: list[int],
    norm: int,
    eps: float,
    pairing: int,
    law: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """Launches the backward kernel, once if q and k need the same gradients, else once for each."""
    grads = new_gradients(q, k, q_weight, k_weight, norm, needs)
    hq, hk, width = q.shape[-2], k.shape[-2], q.shape[-1]
    cfg = tile(max(hq, hk), width, norm == Norm.RMS_FULL, backward=True)
    blocks = (triton.cdiv(hq, cfg.heads), triton.cdiv(hk, cfg.heads))
    wanted = [needs & (Need.Q | Need.Q_WEIGHT | Need.Q_BIAS)]
    wanted.append(needs >> 1 & (Need.Q | Need.Q_WEIGHT | Need.Q_BIAS))
    launches: list[tuple[int, int, int]]  # needs of a side, first head block, head blocks
    if wanted[0] == wanted[1]:
        launches = [(wanted[0], 0, sum(blocks))]
    else:
        launches = [(wanted[0], 0, blocks[0]), (wanted[1], blocks[0], blocks[1])]

    (n_q, q_len), (n_k, k_len) = _tokens(q), _tokens(k)
    most = max(n_q, n_k)
    steps = 1
    if needs & ~(Need.Q | Need.K):
        steps = backward_steps(most, sum(blocks), cfg.tokens)
    programs = triton.cdiv(most, cfg.tokens * steps)
    partials = [
        q.new_empty(
            (2, programs * blocks[side], width * (h if norm == Norm.RMS_FULL else 1))
            if wanted[side] & (Need.Q_WEIGHT | Need.Q_BIAS)
            else (0,),
            dtype=torch.float32,
        )
        for side, h in enumerate((hq, hk))
    ]
    strides = [_strides(dyq), _strides(dyk), _strides(q), _strides(k)]
    unit = _unit(*strides)
    for need, first, count in launches:
        if not need or not programs or not count:
            continue
        _qk_norm_rope_bwd_kernel[(programs, count)](
            dyq, dyk, q, k, q_weight, k_weight, cos, sin, position_index,
            grads[0], grads[1], partials[0], partials[1],
            first, n_q, n_k, max(q_len, 1), max(k_len, 1),
            1 if position_index is None else position_index.shape[0],
            *(s // unit for group in strides for s in group),
            eps,
            HQ=hq, HK=hk, D=width, UNIT=unit, **_rope_constants(axes, cos, position_index),
            NORM=norm, PAIRING=pairing, LAW=law & _POINTS,
            Q_WEIGHT=q_weight is not None, K_WEIGHT=k_weight is not None,
            DX=bool(need & Need.Q), DW=bool(need & Need.Q_WEIGHT), DB=bool(need & Need.Q_BIAS),
            STEPS=steps, TOKENS=cfg.tokens, HEADS=cfg.heads, PAIRS=cfg.pairs,
            num_warps=cfg.num_warps, num_stages=1, enable_fp_fusion=law & _POINTS == 0,
        )  # fmt: skip
    for side in (0, 1):
        for plane, out in enumerate((grads[2 + side], grads[4 + side])):
            if out.numel():
                torch.sum(partials[side][plane], 0, out=out) if out.dtype == torch.float32 \
                    else out.copy_(partials[side][plane].sum(0))  # fmt: skip
    return grads
