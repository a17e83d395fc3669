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
from .config import backward_steps, tile
from .device import (
    BEFORE_ROPE,
    LAYER,
    RMS_FULL,
    ROPE,
    XHAT,
    angles,
    columns,
    load_pairs,
    normalise,
    round_at,
    row_sum,
    store_pairs,
    token_sum,
)

if TYPE_CHECKING:
    from ...aot import AotCase

_POINTS = int(Point.XHAT | Point.AFFINE | Point.PRE_ROPE | Point.ROPE)


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
    col_a, col_b = columns(j, D, B1, B2, B3, R2, PAIRING)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = head_block * HEADS + tl.arange(0, HEADS)
    token_mask = token < n
    mask = token_mask[:, None, None] & (head < H)[None, :, None]

    x_at = (token // length) * (stride_b * UNIT) + (token % length) * (stride_t * UNIT)
    x_at = x_at[:, None, None] + (head * (stride_h * UNIT))[None, :, None]
    a, b = load_pairs(x_ptr, x_at, mask, col_a, col_b, D, PAIRS, PAIRING)  # [T, H, D/2]
    if NORM:
        a, b, rstd = normalise(a, b, mask, j, eps, H, D, NORM)
        a, b = round_at(a, XHAT, LAW, dtype), round_at(b, XHAT, LAW, dtype)
        full: tl.constexpr = NORM == RMS_FULL
        w_at = (head * D)[None, :, None] if full else tl.zeros([1, 1, 1], tl.int32)
        w_mask = (head < H)[None, :, None] if full else tl.full([1, 1, 1], True, tl.int1)
        if WEIGHT:
            wa, wb = load_pairs(weight_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b = a * wa, b * wb
        if BIAS:
            ba, bb = load_pairs(bias_ptr, w_at, w_mask, col_a, col_b, D, PAIRS, PAIRING)
            a, b = a + ba, b + bb
        a, b = round_at(a, BEFORE_ROPE, LAW, dtype), round_at(b, BEFORE_ROPE, LAW, dtype)
    if R2 > 0:
        cos, sin = angles(cos_ptr, sin_ptr, pos_ptr, token, token_mask, head, j, rope_len,
                           H, B1, B2, B3, R2, NUM_POS, PER_HEAD)  # fmt: skip
        cos, sin = round_at(cos, ROPE, LAW, dtype), round_at(sin, ROPE, LAW, dtype)
        ac, bs = round_at(a * cos, ROPE, LAW, dtype), round_at(b * sin, ROPE, LAW, dtype)
        bc, as_ = round_at(b * cos, ROPE, LAW, dtype), round_at(a * sin, ROPE, LAW, dtype)
        a, b = ac - bs, bc + as_
    y_at = (token * (H * D))[:, None, None] + (head * D)[None, :, None]
    store_pairs(y_ptr, y_at, mask, a, b, col_a, col_b, D, PAIRS, PAIRING)


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
        batch, within = token // length, token % length
        dy_at = batch * (dy_stride_b * UNIT) + within * (dy_stride_t * UNIT)
        dy_at = dy_at[:, None, None] + (head * (dy_stride_h * UNIT))[None, :, None]
        ga, gb = load_pairs(dy_ptr, dy_at, mask, col_a, col_b, D, PAIRS, PAIRING)
        if R2 > 0:
            cos, sin = angles(cos_ptr, sin_ptr, pos_ptr, token, token_mask, head, j, rope_len,
                               H, B1, B2, B3, R2, NUM_POS, PER_HEAD)  # fmt: skip
            cos, sin = round_at(cos, ROPE, LAW, dtype), round_at(sin, ROPE, LAW, dtype)
            ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
        if NORM:
            x_at = batch * (stride_b * UNIT) + within * (stride_t * UNIT)
            x_at = x_at[:, None, None] + (head * (stride_h * UNIT))[None, :, None]
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
            dx_at = (token * (H * D))[:, None, None] + (head * D)[None, :, None]
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
    grads = new_gradients(q, k, norm, needs)
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
                torch.sum(partials[side][plane], 0, out=out)
    return grads


# --- ahead-of-time compilation ------------------------------------------------------------------


def _aot_case(
    name: str, kernel: Any, absent: set[str], overrides: dict[str, Any], warps: int, dtype: str
) -> AotCase:
    """Types from the argument names; ``absent`` pointers are None at compile time."""
    from ...aot import AotCase

    signature, constexprs = {}, dict(overrides)
    fp32 = {"cos_ptr", "sin_ptr", "q_partial_ptr", "k_partial_ptr"}
    fp32 |= {"q_weight_ptr", "k_weight_ptr", "q_bias_ptr", "k_bias_ptr"}
    for arg in kernel.arg_names:
        if arg in absent:
            constexprs[arg] = None
        elif arg in overrides:
            continue
        elif arg.endswith("_ptr"):
            signature[arg] = "*i32" if arg == "pos_ptr" else "*fp32" if arg in fp32 else f"*{dtype}"
        else:
            signature[arg] = "fp32" if arg == "eps" else "i32"
    return AotCase(
        name=name, kernel=kernel, signature=signature, constexprs=constexprs,
        num_warps=warps, num_stages=1, memory_bound=True,
        divisible=tuple(a for a in signature if a.endswith("_ptr")), enable_fp_fusion=True,
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Production shapes: Wan, HunyuanVideo, CogVideoX, Cosmos, Open-Sora-Plan, and width 72."""
    shapes = [
        ("wan", 40, 128, (44, 42, 42), Norm.RMS_FULL, Pairing.INTERLEAVED),
        ("hunyuan", 24, 128, (16, 56, 56), Norm.RMS, Pairing.INTERLEAVED),
        ("cogvideox", 48, 64, (16, 24, 24), Norm.LAYER, Pairing.INTERLEAVED),
        ("cosmos", 16, 128, (44, 42, 42), Norm.RMS, Pairing.HALF),
        ("open_sora_plan", 24, 96, (32, 32, 32), Norm.NONE, Pairing.HALF_PER_AXIS),
        ("width_72", 16, 72, (24, 24, 24), Norm.RMS, Pairing.INTERLEAVED),
    ]
    cases = []
    for name, heads, width, axes, norm, pairing in shapes:
        weight, bias, full = norm != Norm.NONE, norm == Norm.LAYER, norm == Norm.RMS_FULL
        common = {
            **_rope_constants(list(axes), None, None),
            "HQ": heads, "HK": heads, "D": width, "UNIT": 8, "NUM_POS": 3,
            "NORM": int(norm), "PAIRING": int(pairing), "LAW": 0,
            "Q_WEIGHT": weight, "K_WEIGHT": weight,
        }  # fmt: skip
        for dtype in ("bf16", "fp32") if name == "hunyuan" else ("bf16",):
            suffix = f"{name}_{dtype}"
            cfg = tile(heads, width, full, backward=False)
            size = {"TOKENS": cfg.tokens, "HEADS": cfg.heads, "PAIRS": cfg.pairs}
            absent = set() if bias else {"q_bias_ptr", "k_bias_ptr"}
            if not weight:
                absent |= {"q_weight_ptr", "k_weight_ptr"}
            constants = {**common, "Q_BIAS": bias, "K_BIAS": bias, **size}
            cases.append(_aot_case(f"fwd_{suffix}", _qk_norm_rope_fwd_kernel, absent, constants,
                                   cfg.num_warps, dtype))  # fmt: skip
            cfg = tile(heads, width, full, backward=True)
            size = {"TOKENS": cfg.tokens, "HEADS": cfg.heads, "PAIRS": cfg.pairs}
            absent -= {"q_bias_ptr", "k_bias_ptr"}
            constants = {**common, "DX": True, "DW": weight, "DB": bias, "STEPS": 8, **size}
            cases.append(_aot_case(f"bwd_{suffix}", _qk_norm_rope_bwd_kernel, absent, constants,
                                   cfg.num_warps, dtype))  # fmt: skip
    return cases
