"""Backward Triton kernel of ``qk_norm_rope`` and its launcher; tiles as in ``kernels.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, launch
from .config import backward_steps, chip_of, tile
from .device import (
    LAYER,
    RMS_FULL,
    ROPE,
    XHAT,
    angles,
    columns,
    load_pairs,
    normalise,
    packed_row,
    round_at,
    row_offsets,
    row_sum,
    store_pairs,
    token_sum,
)
from .launch import POINTS, SIZES, Side, length_of, rope_constants, strides_of, unit_of
from .raw import Norm


@triton.jit(do_not_specialize=SIZES)
def qk_norm_rope_bwd_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr,
    cos_ptr, sin_ptr, pos_ptr, parts_ptr, k_cos_ptr, k_sin_ptr, k_pos_ptr, k_parts_ptr, index_ptr,
    dq_ptr, dk_ptr, q_partial_ptr, k_partial_ptr,
    first_block, n_q, n_k, dyq_len, dyk_len, q_len, k_len,
    rope_len, part_size, first, k_rope_len, k_part_size, k_first,
    dyq_stride_b, dyq_stride_t, dyq_stride_h, dyk_stride_b, dyk_stride_t, dyk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr, GATHER: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr,
    DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    STEPS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """dx, and per program one row of partial dweight and dbias; see ``_bwd_tiles``.

    dy of token n is row index[n]; with GATHER its x and dx are too.
    """
    q_blocks: tl.constexpr = (HQ + HEADS - 1) // HEADS
    block = tl.program_id(1) + first_block
    if block < q_blocks:
        _bwd_tiles(
            dyq_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, pos_ptr, parts_ptr, index_ptr, dq_ptr,
            q_partial_ptr, block, q_blocks, n_q, dyq_len, q_len, rope_len, part_size, first,
            dyq_stride_b, dyq_stride_t, dyq_stride_h, q_stride_b, q_stride_t, q_stride_h, eps,
            HQ, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, GATHER, NORM, PAIRING, LAW,
            Q_WEIGHT, DX, DW, DB, STEPS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip
    else:
        k_blocks: tl.constexpr = (HK + HEADS - 1) // HEADS
        _bwd_tiles(
            dyk_ptr, k_ptr, k_weight_ptr, k_cos_ptr, k_sin_ptr, k_pos_ptr, k_parts_ptr, index_ptr,
            dk_ptr, k_partial_ptr, block - q_blocks, k_blocks, n_k, dyk_len, k_len,
            k_rope_len, k_part_size, k_first,
            dyk_stride_b, dyk_stride_t, dyk_stride_h, k_stride_b, k_stride_t, k_stride_h, eps,
            HK, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, GATHER, NORM, PAIRING, LAW,
            K_WEIGHT, DX, DW, DB, STEPS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip


@triton.jit
def _bwd_tiles(
    dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, pos_ptr, parts_ptr, index_ptr, dx_ptr,
    partial_ptr, head_block, head_blocks: tl.constexpr, n, dy_length, length,
    rope_len, part_size, first,
    dy_stride_b, dy_stride_t, dy_stride_h, stride_b, stride_t, stride_h, eps,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr, GATHER: tl.constexpr,
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
    full: tl.constexpr = NORM == RMS_FULL
    j = tl.arange(0, PAIRS)
    col_a, col_b = columns(j, D, B1, B2, B3, R2, PAIRING)
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
        row = packed_row(index_ptr, token, token_mask)
        source = row if GATHER else token
        dy_at = row_offsets(row, head, dy_length, dy_stride_b, dy_stride_t, dy_stride_h, UNIT)
        ga, gb = load_pairs(dy_ptr, dy_at, mask, col_a, col_b, D, PAIRS, PAIRING)
        if R2 > 0:
            cos, sin = angles(cos_ptr, sin_ptr, pos_ptr, parts_ptr, part_size, first, row,
                               token_mask, head, j, rope_len, H, B1, B2, B3, R2, NUM_POS,
                               PER_HEAD)  # fmt: skip
            cos, sin = round_at(cos, ROPE, LAW, dtype), round_at(sin, ROPE, LAW, dtype)
            ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
        if NORM:
            x_at = row_offsets(source, head, length, stride_b, stride_t, stride_h, UNIT)
            a, b = load_pairs(x_ptr, x_at, mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b, rstd = normalise(a, b, mask, j, eps, H, D, NORM)
            if DB:
                dba += ga
                dbb += gb
            if DW:
                dwa += ga * round_at(a, XHAT, LAW, dtype)
                dwb += gb * round_at(b, XHAT, LAW, dtype)
            if WEIGHT:
                wa, wb = load_pairs(weight_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
                ga, gb = ga * wa, gb * wb
            if DX:
                count = D * H if full else D
                slope = row_sum(ga * a + gb * b, NORM) / count
                offset = row_sum(ga + gb, NORM) / count if NORM == LAYER else 0.0
                ga = (ga - a * slope - offset) * rstd
                gb = (gb - b * slope - offset) * rstd
        if DX:
            dx_at = (source.to(tl.int64) * (H * D))[:, None, None] + (head * D)[None, :, None]
            store_pairs(dx_ptr, dx_at, mask, ga, gb, col_a, col_b, D, PAIRS, PAIRING)

    # Partials are [dweight, dbias] x programs x width; a fixed-order sum over programs follows.
    width: tl.constexpr = H * D if full else D
    rows = tl.num_programs(0).to(tl.int64) * head_blocks
    p_at = (tl.program_id(0).to(tl.int64) * head_blocks + head_block) * width + w_at
    if DW:
        dwa, dwb = token_sum(dwa, full), token_sum(dwb, full)
        store_pairs(partial_ptr, p_at, w_mask, dwa, dwb, col_a, col_b, D, PAIRS, PAIRING)
    if DB:
        dba, dbb = token_sum(dba, full), token_sum(dbb, full)
        p_at += rows * width
        store_pairs(partial_ptr, p_at, w_mask, dba, dbb, col_a, col_b, D, PAIRS, PAIRING)


def launch_backward(
    q: Side,
    k: Side,
    index: Tensor | None,
    gather: bool,
    axes: list[int],
    norm: int,
    eps: float,
    pairing: int,
    law: int,
) -> None:
    """One pass: a single launch if q and k need the same gradients, else one for each."""
    width = q.x.shape[-1]
    cfg = tile(max(q.heads, k.heads), width, norm == Norm.RMS_FULL, True, chip_of(q.x))
    blocks = (cdiv(q.heads, cfg.heads), cdiv(k.heads, cfg.heads))
    launches: list[tuple[Side, int, int]]  # whose needs, first head block, head blocks
    if q.wanted == k.wanted:
        launches = [(q, 0, sum(blocks))]
    else:
        launches = [(q, 0, blocks[0]), (k, blocks[0], blocks[1])]

    most = max(q.tokens, k.tokens)
    summed = any(side.wanted[1] or side.wanted[2] for side in (q, k))
    steps = backward_steps(most, sum(blocks), cfg.tokens) if summed else 1
    programs = cdiv(most, cfg.tokens * steps)
    partials = []
    for side, count in zip((q, k), blocks, strict=True):
        size = width * (side.heads if norm == Norm.RMS_FULL else 1)
        rows = (2, programs * count, size) if side.wanted[1] or side.wanted[2] else (0,)
        partials.append(side.x.new_empty(rows, dtype=torch.float32))
    # A side that is not wanted has no dy and no dx: the pointers beside it are never followed.
    dys = [side.x if side.dy is None else side.dy for side in (q, k)]
    dxs = [side.x if side.y is None else side.y for side in (q, k)]
    groups = [strides_of(t) for t in (*dys, q.x, k.x)]
    unit = unit_of(*groups)
    for side, first, count in launches:
        if not any(side.wanted) or not programs or not count:
            continue
        launch(
            qk_norm_rope_bwd_kernel, (programs, count), q.x.device,
            *dys, q.x, k.x, q.weight, k.weight, *q.tables, *k.tables, index,
            *dxs, *partials,
            first, q.tokens, k.tokens, length_of(dys[0]), length_of(dys[1]), q.length, k.length,
            *q.rope_sizes, *k.rope_sizes,
            *(s // unit for group in groups for s in group),
            eps,
            HQ=q.heads, HK=k.heads, D=width, UNIT=unit, **rope_constants(axes, q.tables),
            GATHER=gather, NORM=norm, PAIRING=pairing, LAW=law & POINTS,
            Q_WEIGHT=q.weight is not None, K_WEIGHT=k.weight is not None,
            DX=side.wanted[0], DW=side.wanted[1], DB=side.wanted[2],
            STEPS=steps, TOKENS=cfg.tokens, HEADS=cfg.heads, PAIRS=cfg.pairs,
            num_warps=cfg.num_warps, num_stages=1, enable_fp_fusion=law & POINTS == 0,
        )  # fmt: skip
    for side, partial in zip((q, k), partials, strict=True):
        for plane, out in enumerate((side.dweight, side.dbias)):
            if out is not None:
                torch.sum(partial[plane], 0, out=out)
