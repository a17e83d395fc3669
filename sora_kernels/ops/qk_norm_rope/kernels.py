"""Triton kernels of ``qk_norm_rope``: the forward, and the launchers of both directions.

The formula is in ``reference.py``, what the launchers take in ``raw.py``, the backward kernel in
``kernels_bwd.py``. One program owns a tile of tokens x heads x components of q *or* of k
(``program_id(1)`` runs over the head blocks of q, then over those of k). A tile is held as the two
components of every pair, ``a`` and ``b`` of ``[TOKENS, HEADS, PAIRS]``, so that the rotation is
register arithmetic. Pairs at and after r/2 are the components that are not rotated: their cos is 1
and their sin is 0. cos and sin are read once per token and shared by its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, launch
from .config import chip_of, tile
from .device import (
    BEFORE_ROPE,
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
    store_pairs,
)
from .kernels_bwd import launch_backward, qk_norm_rope_bwd_kernel
from .launch import POINTS, SIZES, Side, rope_constants, side_tables, unit_of
from .raw import TABLES, Norm, Pairing, new_gradients, new_outputs

if TYPE_CHECKING:
    from ...aot import AotCase


@triton.jit(do_not_specialize=SIZES)
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr,
    cos_ptr, sin_ptr, pos_ptr, parts_ptr, k_cos_ptr, k_sin_ptr, k_pos_ptr, k_parts_ptr,
    index_ptr, yq_ptr, yk_ptr,
    n_q, n_k, q_len, k_len, rope_len, part_size, first, k_rope_len, k_part_size, k_first,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr, X_PACKED: tl.constexpr, Y_PACKED: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """y = rotate(norm(x) * weight + bias). Strides are in units of UNIT elements.

    X_PACKED, Y_PACKED: token n is read from, written to row index[n] rather than n.
    """
    q_blocks: tl.constexpr = (HQ + HEADS - 1) // HEADS
    if tl.program_id(1) < q_blocks:
        _fwd_tile(
            q_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, pos_ptr, parts_ptr,
            index_ptr, yq_ptr, tl.program_id(1),
            n_q, q_len, rope_len, part_size, first, q_stride_b, q_stride_t, q_stride_h, eps,
            HQ, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, X_PACKED, Y_PACKED,
            NORM, PAIRING, LAW, Q_WEIGHT, Q_BIAS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip
    else:
        _fwd_tile(
            k_ptr, k_weight_ptr, k_bias_ptr, k_cos_ptr, k_sin_ptr, k_pos_ptr, k_parts_ptr,
            index_ptr, yk_ptr, tl.program_id(1) - q_blocks,
            n_k, k_len, k_rope_len, k_part_size, k_first, k_stride_b, k_stride_t, k_stride_h, eps,
            HK, D, UNIT, B1, B2, B3, R2, NUM_POS, PER_HEAD, X_PACKED, Y_PACKED,
            NORM, PAIRING, LAW, K_WEIGHT, K_BIAS, TOKENS, HEADS, PAIRS,
        )  # fmt: skip


@triton.jit
def _fwd_tile(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, pos_ptr, parts_ptr, index_ptr, y_ptr,
    head_block,
    n, length, rope_len, part_size, first, stride_b, stride_t, stride_h, eps,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, R2: tl.constexpr,
    NUM_POS: tl.constexpr, PER_HEAD: tl.constexpr, X_PACKED: tl.constexpr, Y_PACKED: tl.constexpr,
    NORM: tl.constexpr, PAIRING: tl.constexpr, LAW: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    j = tl.arange(0, PAIRS)
    col_a, col_b = columns(j, D, B1, B2, B3, R2, PAIRING)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = head_block * HEADS + tl.arange(0, HEADS)
    token_mask = token < n
    mask = token_mask[:, None, None] & (head < H)[None, :, None]

    row = packed_row(index_ptr, token, token_mask)
    source = row if X_PACKED else token
    x_at = row_offsets(source, head, length, stride_b, stride_t, stride_h, UNIT)
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
        cos, sin = angles(cos_ptr, sin_ptr, pos_ptr, parts_ptr, part_size, first, row, token_mask,
                           head, j, rope_len, H, B1, B2, B3, R2, NUM_POS, PER_HEAD)  # fmt: skip
        cos, sin = round_at(cos, ROPE, LAW, dtype), round_at(sin, ROPE, LAW, dtype)
        ac, bs = round_at(a * cos, ROPE, LAW, dtype), round_at(b * sin, ROPE, LAW, dtype)
        bc, as_ = round_at(b * cos, ROPE, LAW, dtype), round_at(a * sin, ROPE, LAW, dtype)
        a, b = ac - bs, bc + as_
    y_row = row if Y_PACKED else token
    y_at = (y_row.to(tl.int64) * (H * D))[:, None, None] + (head * D)[None, :, None]
    store_pairs(y_ptr, y_at, mask, a, b, col_a, col_b, D, PAIRS, PAIRING)


def launch_forward(
    q: Side,
    k: Side | None,
    index: Tensor | None,
    packed: tuple[bool, bool],
    axes: list[int],
    norm: int,
    eps: float,
    pairing: int,
    law: int,
) -> None:
    """One pass; ``packed`` = (X_PACKED, Y_PACKED). Without k, only q's blocks run."""
    hq, hk, width = q.heads, (k or q).heads, q.x.shape[-1]
    cfg = tile(max(hq, hk), width, norm == Norm.RMS_FULL, False, chip_of(q.x))
    blocks = cdiv(hq, cfg.heads) + (cdiv(hk, cfg.heads) if k else 0)
    k = k or q
    grid = (cdiv(max(q.tokens, k.tokens), cfg.tokens), blocks)
    unit = unit_of(q.strides, k.strides)
    launch(
        qk_norm_rope_fwd_kernel, grid, q.x.device,
        q.x, k.x, q.weight, k.weight, q.bias, k.bias, *q.tables, *k.tables, index, q.y, k.y,
        q.tokens, k.tokens, q.length, k.length, *q.rope_sizes, *k.rope_sizes,
        *(s // unit for group in (q.strides, k.strides) for s in group),
        eps,
        HQ=hq, HK=hk, D=width, UNIT=unit, **rope_constants(axes, q.tables),
        X_PACKED=packed[0], Y_PACKED=packed[1], NORM=norm, PAIRING=pairing, LAW=law & POINTS,
        Q_WEIGHT=q.weight is not None, K_WEIGHT=k.weight is not None,
        Q_BIAS=q.bias is not None, K_BIAS=k.bias is not None,
        TOKENS=cfg.tokens, HEADS=cfg.heads, PAIRS=cfg.pairs,
        num_warps=cfg.num_warps, num_stages=1, enable_fp_fusion=law & POINTS == 0,
    )  # fmt: skip


def copy_rows(x: Tensor, y: Tensor, index: Tensor, gather: bool) -> None:
    """``y[index[n]] = x[n]``, or with ``gather`` ``y[n] = x[index[n]]``, of rows [H, D]."""
    side = Side(x, index.shape[0], y=y)
    launch_forward(side, None, index, (gather, not gather), [], int(Norm.NONE), 0.0, 0, 0)


# --- raw ops ------------------------------------------------------------------------------------

Lists = Sequence[Tensor]


def _sides(
    q: Lists, k: Lists, parameters: Sequence[Lists], index: Lists, tables: Any, stream: int
) -> tuple[Side, Side]:
    """q and k of one pass. ``parameters``: q_weight, k_weight, q_bias, k_bias."""
    sides = []
    for i, x in enumerate((q, k)):
        mine = x[stream] if len(x) > 1 else x[0]
        weight, bias = (parameters[j][stream] if parameters[j] else None for j in (i, 2 + i))
        tokens = index[stream].shape[0] if index else mine.shape[:-2].numel()
        sides.append(Side(mine, tokens, weight, bias, *side_tables(tables, i)))
    return sides[0], sides[1]


def forward(
    q: Lists, k: Lists, v: Lists, q_weight: Lists, k_weight: Lists, q_bias: Lists, k_bias: Lists,
    index: Lists, tokens: int, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``rest``: the tables (``raw.TABLES``), axes, norm, eps, pairing, law."""
    yq, yk, yv = new_outputs(q, k, v, tokens)
    tables, options = rest[:TABLES], rest[TABLES:]
    parameters = (q_weight, k_weight, q_bias, k_bias)
    for s in range(max(1, len(index))):
        one, other = _sides(q, k, parameters, index, tables, s)
        one.y, other.y = yq, yk
        rows = index[s] if index else None
        launch_forward(one, other, rows, (len(q) == 1, True), *options)
        if v:
            copy_rows(v[s], yv, index[s], gather=False)
    return yq, yk, yv


def backward(
    dyq: Tensor | None, dyk: Tensor | None, dyv: Tensor | None, q: Lists, k: Lists, v: Lists,
    q_weight: Lists, k_weight: Lists, q_bias: Lists, k_bias: Lists, index: Lists, tokens: int,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """``rest``: as in ``forward``, and needs."""
    parameters = (q_weight, k_weight, q_bias, k_bias)
    tables, options, needs = rest[:TABLES], rest[TABLES:-1], rest[-1]
    grads = new_gradients(q, k, v, parameters, needs)
    wanted = iter([g if need else None for g, need in zip(grads, needs, strict=True)])
    dq, dk, dv, *dparameters = [[next(wanted) for _ in x] for x in (q, k, v, *parameters)]
    for s in range(max(1, len(index))):
        sides = _sides(q, k, parameters, index, tables, s)
        for i, (side, dx) in enumerate(zip(sides, (dq, dk), strict=True)):
            side.dy = (dyq, dyk)[i]
            side.y = dx[s] if len(dx) > 1 else dx[0]
            side.dweight = dparameters[i][s] if dparameters[i] else None
            side.dbias = dparameters[2 + i][s] if dparameters[2 + i] else None
        launch_backward(*sides, index[s] if index else None, len(q) == 1, *options)
        target = dv[s] if dv else None
        if target is not None:
            assert dyv is not None
            copy_rows(dyv, target, index[s], gather=True)
    return grads


# --- ahead-of-time compilation ------------------------------------------------------------------


def _aot_case(
    name: str, kernel: Any, absent: set[str], overrides: dict[str, Any], warps: int, dtype: str
) -> AotCase:
    """Types from the argument names; ``absent`` pointers are None at compile time."""
    from ...aot import AotCase

    ints = ("pos_ptr", "k_pos_ptr", "parts_ptr", "k_parts_ptr")
    types = dict.fromkeys(ints, "*i32") | {"index_ptr": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "k_cos_ptr", "k_sin_ptr"), "*fp32")
    types |= dict.fromkeys(("q_partial_ptr", "k_partial_ptr"), "*fp32")
    types |= {f"{side}_{part}_ptr": "*fp32" for side in "qk" for part in ("weight", "bias")}
    signature, constexprs = {}, dict(overrides)
    for arg in kernel.arg_names:
        if arg in absent:
            constexprs[arg] = None
        elif arg.endswith("_len") and "rope" not in arg:
            constexprs[arg] = None  # [N, H, D]
        elif arg not in overrides:
            signature[arg] = types.get(arg, f"*{dtype}" if arg.endswith("_ptr") else "i32")
    return AotCase(
        name=name, kernel=kernel, signature=signature, constexprs=constexprs,
        num_warps=warps, num_stages=1, memory_bound=True,
        divisible=tuple(a for a in signature if a.endswith("_ptr")), enable_fp_fusion=True,
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Wan, HunyuanVideo (single and joint), CogVideoX, Cosmos, Open-Sora-Plan, and width 72."""
    shapes = [
        ("wan", 40, 128, (44, 42, 42), Norm.RMS_FULL, Pairing.INTERLEAVED),
        ("hunyuan", 24, 128, (16, 56, 56), Norm.RMS, Pairing.INTERLEAVED),
        ("hunyuan_joint", 24, 128, (16, 56, 56), Norm.RMS, Pairing.INTERLEAVED),
        ("cogvideox", 48, 64, (16, 24, 24), Norm.LAYER, Pairing.INTERLEAVED),
        ("cosmos", 16, 128, (44, 42, 42), Norm.RMS, Pairing.HALF),
        ("open_sora_plan", 24, 96, (32, 32, 32), Norm.NONE, Pairing.HALF_PER_AXIS),
        ("width_72", 16, 72, (24, 24, 24), Norm.RMS, Pairing.INTERLEAVED),
    ]
    given = {"cosmos", "width_72"}  # rows of the tables by an index, else from the grids
    cases = []
    for name, heads, width, axes, norm, pairing in shapes:
        weight, bias, full = norm != Norm.NONE, norm == Norm.LAYER, norm == Norm.RMS_FULL
        absent = set() if name.endswith("joint") else {"index_ptr"}
        if name in given:
            absent |= {"parts_ptr", "k_parts_ptr"}
        if not weight:
            absent |= {"q_weight_ptr", "k_weight_ptr"}
        common = {
            **rope_constants(list(axes), (None,) * 4),
            "HQ": heads, "HK": heads, "D": width, "UNIT": 8, "NUM_POS": 3 if name in given else 0,
            "NORM": int(norm), "PAIRING": int(pairing), "LAW": 0,
            "Q_WEIGHT": weight, "K_WEIGHT": weight,
        }  # fmt: skip
        for dtype in ("bf16", "fp32") if name == "hunyuan" else ("bf16",):
            suffix = f"{name}_{dtype}"
            cfg = tile(heads, width, full, backward=False)
            size = {"TOKENS": cfg.tokens, "HEADS": cfg.heads, "PAIRS": cfg.pairs}
            constants = {**common, "Q_BIAS": bias, "K_BIAS": bias, "X_PACKED": False,
                         "Y_PACKED": True, **size}  # fmt: skip
            cases.append(
                _aot_case(
                    f"fwd_{suffix}",
                    qk_norm_rope_fwd_kernel,
                    absent if bias else absent | {"q_bias_ptr", "k_bias_ptr"},
                    constants,
                    cfg.num_warps,
                    dtype,
                )  # fmt: skip
            )
            cfg = tile(heads, width, full, backward=True)
            size = {"TOKENS": cfg.tokens, "HEADS": cfg.heads, "PAIRS": cfg.pairs}
            constants = {**common, "DX": True, "DW": weight, "DB": bias, "STEPS": 8,
                         "GATHER": False, **size}  # fmt: skip
            cases.append(
                _aot_case(
                    f"bwd_{suffix}",
                    qk_norm_rope_bwd_kernel,
                    absent,
                    constants,
                    cfg.num_warps,
                    dtype,
                )  # fmt: skip
            )
    return cases
