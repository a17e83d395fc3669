"""Triton backward kernel of gate_residual_norm_modulate: everything in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ...aot import AotCase
from .._device import (
    AFFINE,
    GATED,
    RESIDUAL,
    XHAT,
    load_f32,
    load_modulation,
    load_one_plus,
    load_vectors,
    row_sums,
)
from .._grouped import flush_four, round_if, run_at, sorted_token, token_offset
from .._launch import SIZES
from . import config

# Bits of `needs`, in the order of the backward's results.
DX, DY, DY2, DGATE, DGATE2, DWEIGHT, DBIAS, DSHIFT, DSCALE = (1 << i for i in range(9))
_DX, _DY, _DY2 = tl.constexpr(DX), tl.constexpr(DY), tl.constexpr(DY2)
_DGATE, _DGATE2 = tl.constexpr(DGATE), tl.constexpr(DGATE2)
_DWEIGHT, _DBIAS = tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)
_DSHIFT, _DSCALE = tl.constexpr(DSHIFT), tl.constexpr(DSCALE)


@triton.jit
def _factors(
    row, gate_ptr, gate_stride, gate2_ptr, gate2_stride, scale_ptr, scale_stride, gate_table_ptr,
    scale_table_ptr, cols, mask, LAW: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """gate, gate2 and 1 + scale of one row; 1 where one is absent."""
    gate = 1.0
    if gate_ptr is not None:
        gate = load_modulation(
            gate_ptr,
            gate_table_ptr,
            row.to(tl.int64) * gate_stride + cols,
            cols,
            mask,
            mask,
            LAW,
            dtype,
        )
    gate2 = 1.0
    if gate2_ptr is not None:
        gate2 = load_f32(gate2_ptr + row.to(tl.int64) * gate2_stride + cols, mask)
    one_plus = 1.0
    if scale_ptr is not None:
        one_plus = load_one_plus(
            scale_ptr,
            scale_table_ptr,
            row.to(tl.int64) * scale_stride + cols,
            cols,
            mask,
            mask,
            LAW,
            dtype,
        )
    return gate, gate2, one_plus


@triton.jit
def _load_branch(y_ptr, y_offset, cols, mask):
    """A sublayer's output for one token, 0 if it is absent."""
    y = 0.0
    if y_ptr is not None:
        y = load_f32(y_ptr + y_offset + cols, mask)
    return y


@triton.jit
def _add_branch(
    r, y_ptr, y, gate, stream: tl.constexpr, LAW: tl.constexpr
):  # fmt: skip
    """r + gate * y as the forward added it."""
    if y_ptr is not None:
        branch = round_if(gate * y, LAW, GATED, y_ptr.dtype.element_ty)
        r = round_if(r + branch, LAW, RESIDUAL, stream)
    return r


@triton.jit
def _norm_gradient(
    x_ptr, x_offset, y_ptr, y, y2_ptr, y2, gate, gate2, mean, rstd, dnormed_ptr, dnormed_offset,
    one_plus, weight, cols, mask, LAW: tl.constexpr,
):  # fmt: skip
    """xhat, d = dnormed, g = d * (1 + scale) and h = g * weight of one token's columns."""
    stream: tl.constexpr = x_ptr.dtype.element_ty
    r = load_f32(x_ptr + x_offset + cols, mask)
    r = _add_branch(r, y_ptr, y, gate, stream, LAW)
    r = _add_branch(r, y2_ptr, y2, gate2, stream, LAW)
    d = load_f32(dnormed_ptr + dnormed_offset + cols, mask)
    g = d * one_plus
    return (r - mean) * rstd, d, g, g * weight


@triton.jit
def _token(
    n, row, dresidual_ptr, dresidual_offset, dnormed_ptr, d_offset, x_ptr, x_offset, y_ptr,
    y_offset, y2_ptr, y2_offset, mean_ptr, rstd_ptr, gate_ptr, gate_stride, gate2_ptr,
    gate2_stride, scale_ptr, scale_stride, gate_table_ptr, scale_table_ptr, weight_ptr, gate,
    gate2, one_plus, weight, bias, dgate, dgate2, dshift, dscale, dweight, dbias, dx_ptr, dy_ptr,
    dy2_ptr, width, cols, mask,
    NEEDS: tl.constexpr, LAW: tl.constexpr, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores dx, dy and dy2 of token n; returns the sums dgate, dgate2, dshift, dscale, dweight and
    dbias with what it adds to them. The modulations by pointer are for other slices' columns."""
    dtype: tl.constexpr = dnormed_ptr.dtype.element_ty
    rstd = tl.load(rstd_ptr + n)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + n)

    if not WHOLE:
        all_h = tl.zeros([BLOCK_D], dtype=tl.float32)
        all_hx = tl.zeros([BLOCK_D], dtype=tl.float32)
        for column in range(0, width, BLOCK_D):
            there = column + tl.arange(0, BLOCK_D)
            inside = there < width
            weight_there, _ = load_vectors(weight_ptr, None, there, inside)
            gate_there, gate2_there, one_plus_there = _factors(
                row, gate_ptr, gate_stride, gate2_ptr, gate2_stride, scale_ptr, scale_stride,
                gate_table_ptr, scale_table_ptr, there, inside, LAW, dtype,
            )  # fmt: skip
            xhat_there, _, _, h_there = _norm_gradient(
                x_ptr, x_offset, y_ptr, _load_branch(y_ptr, y_offset, there, inside),
                y2_ptr, _load_branch(y2_ptr, y2_offset, there, inside), gate_there, gate2_there,
                mean, rstd, dnormed_ptr, d_offset, one_plus_there,
                weight_there, there, inside, LAW,
            )  # fmt: skip
            all_h += h_there
            all_hx += h_there * xhat_there
    y = _load_branch(y_ptr, y_offset, cols, mask)
    y2 = _load_branch(y2_ptr, y2_offset, cols, mask)
    xhat, d, g, h = _norm_gradient(
        x_ptr, x_offset, y_ptr, y, y2_ptr, y2, gate, gate2, mean, rstd, dnormed_ptr, d_offset,
        one_plus, weight, cols, mask, LAW,
    )  # fmt: skip
    # before the row is reduced, so that d and g need no registers after it
    rounded = round_if(xhat, LAW, XHAT, dtype)
    dshift += d
    dscale += d * round_if(rounded * weight + bias, LAW, AFFINE, dtype)
    dweight += g * rounded
    dbias += g
    if WHOLE:
        all_h = h
        all_hx = h * xhat
    slope, offset = row_sums(all_hx, all_h, mean_ptr is not None)
    dr = (h - xhat * (slope / width) - offset / width) * rstd
    if dresidual_ptr is not None:
        dr += load_f32(dresidual_ptr + dresidual_offset + cols, mask)
    if _DX & NEEDS:
        tl.store(dx_ptr + n.to(tl.int64) * width + cols, dr.to(dx_ptr.dtype.element_ty), mask=mask)
    if _DY & NEEDS:
        tl.store(
            dy_ptr + n.to(tl.int64) * width + cols,
            (gate * dr).to(dy_ptr.dtype.element_ty),
            mask=mask,
        )
    if _DY2 & NEEDS:
        tl.store(
            dy2_ptr + n.to(tl.int64) * width + cols,
            (gate2 * dr).to(dy2_ptr.dtype.element_ty),
            mask=mask,
        )
    dgate += dr * y
    dgate2 += dr * y2
    return dgate, dgate2, dshift, dscale, dweight, dbias


@triton.jit(**SIZES)
def gate_residual_norm_modulate_bwd_kernel(
    dresidual_ptr,  # [B, L, D] or None
    dnormed_ptr,  # [B, L, D]
    x_ptr,  # [B, L, D]: the stream before the branches, or after them if y_ptr is None
    y_ptr,  # [B, L, D] or None
    y2_ptr,
    mean_ptr,  # [N], None for RMS
    rstd_ptr,  # [N]
    gate_ptr,  # [R, D] or None
    gate2_ptr,
    weight_ptr,  # [D] or None
    bias_ptr,
    scale_ptr,  # [R, D] or None
    gate_table_ptr,  # [D] or None
    scale_table_ptr,
    index_ptr,  # [N] or None
    order_ptr,  # [N] or None
    offsets_ptr,  # [R + 1] or None
    dx_ptr,  # [N, D]
    dy_ptr,
    dy2_ptr,
    dgate_ptr,  # [R, D]
    dgate2_ptr,
    dshift_ptr,
    dscale_ptr,
    dweight_partial_ptr,  # [blocks, D] fp32
    dbias_partial_ptr,
    partial_ptr,  # [4, blocks, 2, D] fp32
    tokens,
    width,
    per_batch,  # L or None
    dresidual_batch_stride,
    dresidual_token_stride,
    dnormed_batch_stride,
    dnormed_token_stride,
    x_batch_stride,
    x_token_stride,
    y_batch_stride,
    y_token_stride,
    y2_batch_stride,
    y2_token_stride,
    gate_stride,
    gate2_stride,
    scale_stride,
    tokens_per_row,
    block_tokens,
    slices,  # programs per block of tokens, BLOCK_D columns each
    NEEDS: tl.constexpr,
    LAW: tl.constexpr,
    GROUPED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, dy and the running sums of all other gradients, over one block of sorted tokens.

    With n = xhat * weight + bias and g = dnormed * (1 + scale): dshift += dnormed,
    dscale += dnormed * n, dweight += g * xhat, dbias += g. For h = g * weight the gradient of the
    residual is dr = dresidual + rstd * (h - mean(h) - xhat * mean(h * xhat)) (RMS: no mean(h));
    dx = dr, dy = gate * dr, dgate += dr * y.

    A block is walked run by run, as in norm_modulate: only streams change within a run, and their
    loads are pipelined.

    The sums of a row wider than BLOCK_D do not fit the registers of one program. Such rows are cut
    into slices: each program computes the two means itself, from all columns (its neighbours read
    the same ones, so they come from the L2 cache), and then its own slice.
    """
    dtype: tl.constexpr = dnormed_ptr.dtype.element_ty
    block = tl.program_id(0) // slices
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = (tl.program_id(0) % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < width
    # one gradient's share of the partials
    share = (tl.num_programs(0) // slices).to(tl.int64) * 2 * width
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight, bias = load_vectors(weight_ptr, bias_ptr, cols, mask)

    position = start
    while position < end:
        row, stop = run_at(
            position, end, order_ptr, index_ptr, offsets_ptr, tokens_per_row, GROUPED
        )
        gate, gate2, one_plus = _factors(
            row, gate_ptr, gate_stride, gate2_ptr, gate2_stride, scale_ptr, scale_stride,
            gate_table_ptr, scale_table_ptr, cols, mask, LAW, dtype,
        )  # fmt: skip
        dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
        dgate2 = tl.zeros([BLOCK_D], dtype=tl.float32)
        dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
        dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i in tl.range(0, stop - position, num_stages=STAGES):
            n = sorted_token(position + i, order_ptr)
            dgate, dgate2, dshift, dscale, dweight, dbias = _token(
                n, row,
                dresidual_ptr,
                token_offset(n, per_batch, dresidual_batch_stride, dresidual_token_stride),
                dnormed_ptr, token_offset(n, per_batch, dnormed_batch_stride, dnormed_token_stride),
                x_ptr, token_offset(n, per_batch, x_batch_stride, x_token_stride),
                y_ptr, token_offset(n, per_batch, y_batch_stride, y_token_stride),
                y2_ptr, token_offset(n, per_batch, y2_batch_stride, y2_token_stride),
                mean_ptr, rstd_ptr, gate_ptr, gate_stride, gate2_ptr, gate2_stride, scale_ptr,
                scale_stride, gate_table_ptr, scale_table_ptr, weight_ptr, gate, gate2, one_plus,
                weight, bias, dgate, dgate2, dshift, dscale,
                dweight, dbias, dx_ptr, dy_ptr, dy2_ptr, width, cols, mask, NEEDS, LAW, WHOLE,
                BLOCK_D,
            )  # fmt: skip
        flush_four(
            dgate, dgate2, dshift, dscale, dgate_ptr, dgate2_ptr, dshift_ptr, dscale_ptr,
            row, offsets_ptr, tokens_per_row, start, end, block, partial_ptr, share, width, cols,
            mask,
            _DGATE & NEEDS, _DGATE2 & NEEDS, _DSHIFT & NEEDS, _DSCALE & NEEDS,
        )  # fmt: skip
        position = stop

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block.to(tl.int64) * width + cols, dweight, mask=mask)
    if _DBIAS & NEEDS:
        tl.store(dbias_partial_ptr + block.to(tl.int64) * width + cols, dbias, mask=mask)


def backward_case(width: int) -> AotCase:
    """Gate, shift and scale of a packed batch, all gradients."""
    block_d, _, slices, num_warps, stages = config.backward(32768, width, 4, 2)
    pointers = {
        "dresidual_ptr": "*bf16", "dnormed_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16",
        "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "gate_ptr": "*bf16", "scale_ptr": "*bf16",
        "index_ptr": "*i32", "offsets_ptr": "*i32", "dx_ptr": "*bf16", "dy_ptr": "*bf16",
        "dgate_ptr": "*bf16", "dshift_ptr": "*bf16", "dscale_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    absent = ("y2_ptr", "gate2_ptr", "weight_ptr", "bias_ptr", "gate_table_ptr", "scale_table_ptr",
              "order_ptr", "dy2_ptr", "dgate2_ptr", "dweight_partial_ptr",
              "dbias_partial_ptr", "per_batch")  # fmt: skip
    names = ("dresidual", "dnormed", "x", "y")
    strides = (*(f"{t}_{s}_stride" for t in names for s in ("batch", "token")), "gate_stride",
               "scale_stride")  # fmt: skip
    integers = ("tokens", "width", *strides, "y2_batch_stride", "y2_token_stride",
                "gate2_stride", "tokens_per_row", "block_tokens", "slices")  # fmt: skip
    return AotCase(
        name=f"gate_residual_norm_modulate_bwd_d{width}",
        kernel=gate_residual_norm_modulate_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={
            **dict.fromkeys(absent),
            "NEEDS": DX | DY | DGATE | DSHIFT | DSCALE,
            "LAW": 0,
            "GROUPED": True,
            "WHOLE": slices == 1,
            "BLOCK_D": block_d,
            "STAGES": stages,
        },
        num_warps=num_warps,
        num_stages=1,
        maxnreg=config.most_registers(kept=5),
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
