"""Triton backward kernel of gate_residual_norm_modulate: everything in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ...aot import AotCase
from .._device import GATED, RESIDUAL, XHAT, affine, load_f32, load_modulation, load_one_plus
from .._grouped import flush_four, round_if, row_bounds, row_of, sorted_token, token_offset
from . import config

# Bits of `needs`, in the order of the backward's results.
DX, DY, DY2, DGATE, DGATE2, DWEIGHT, DBIAS, DSHIFT, DSCALE = (1 << i for i in range(9))
_DX, _DY, _DY2 = tl.constexpr(DX), tl.constexpr(DY), tl.constexpr(DY2)
_DGATE, _DGATE2 = tl.constexpr(DGATE), tl.constexpr(DGATE2)
_DWEIGHT, _DBIAS = tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)
_DSHIFT, _DSCALE = tl.constexpr(DSHIFT), tl.constexpr(DSCALE)


@triton.jit
def _add_branch(
    r, y_ptr, y_offset, gate_ptr, gate_offset, table_ptr, cols, mask, stream: tl.constexpr,
    LAW: tl.constexpr,
):  # fmt: skip
    """r + gate * y as the forward added it."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    branch = load_f32(y_ptr + y_offset + cols, mask)
    if gate_ptr is not None:
        gate = load_modulation(
            gate_ptr, table_ptr, gate_offset + cols, cols, mask, mask, LAW, dtype
        )
        branch = round_if(gate * branch, LAW, GATED, dtype)
    return round_if(r + branch, LAW, RESIDUAL, stream)


@triton.jit
def _store_branch(
    dr, dy_ptr, dy_offset, gate_ptr, gate_offset, table_ptr, cols, mask, LAW: tl.constexpr
):  # fmt: skip
    """dy = gate * dr."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    if gate_ptr is not None:
        dr *= load_modulation(gate_ptr, table_ptr, gate_offset + cols, cols, mask, mask, LAW, dtype)
    tl.store(dy_ptr + dy_offset + cols, dr.to(dtype), mask=mask)


@triton.jit
def _norm_gradient(
    x_ptr, x_offset, y_ptr, y_offset, y2_ptr, y2_offset, gate_ptr, gate_offset, gate2_ptr,
    gate2_offset, gate_table_ptr, mean, rstd, dnormed_ptr, dnormed_offset, scale_ptr, scale_offset,
    scale_table_ptr, weight_ptr, cols, mask, LAW: tl.constexpr,
):  # fmt: skip
    """xhat, d = dnormed, g = d * (1 + scale) and h = g * weight of one token's columns."""
    stream: tl.constexpr = x_ptr.dtype.element_ty
    dtype: tl.constexpr = dnormed_ptr.dtype.element_ty
    r = load_f32(x_ptr + x_offset + cols, mask)
    if y_ptr is not None:
        r = _add_branch(r, y_ptr, y_offset, gate_ptr, gate_offset, gate_table_ptr, cols, mask,
                        stream, LAW)  # fmt: skip
    if y2_ptr is not None:
        r = _add_branch(r, y2_ptr, y2_offset, gate2_ptr, gate2_offset, None, cols, mask, stream,
                        LAW)  # fmt: skip
    d = load_f32(dnormed_ptr + dnormed_offset + cols, mask)
    g = d
    if scale_ptr is not None:
        g *= load_one_plus(scale_ptr, scale_table_ptr, scale_offset + cols, cols, mask, mask, LAW,
                           dtype)  # fmt: skip
    h = g
    if weight_ptr is not None:
        h *= load_f32(weight_ptr + cols, mask)
    return (r - mean) * rstd, d, g, h


@triton.jit
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
    per_batch,
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
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, dy and the running sums of all other gradients, over one block of sorted tokens.

    With n = xhat * weight + bias and g = dnormed * (1 + scale): dshift += dnormed,
    dscale += dnormed * n, dweight += g * xhat, dbias += g. For h = g * weight the gradient of the
    residual is dr = dresidual + rstd * (h - mean(h) - xhat * mean(h * xhat)) (RMS: no mean(h));
    dx = dr, dy = gate * dr, dgate += dr * y.

    The sums of a row wider than BLOCK_D do not fit the registers of one program. Such rows are cut
    into slices: each program computes the two means itself, from all columns (its neighbours read
    the same ones, so they come from the L2 cache), and then its own slice.
    """
    dtype: tl.constexpr = dnormed_ptr.dtype.element_ty
    block = (tl.program_id(0) // slices).to(tl.int64)
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = (tl.program_id(0) % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < width
    # one gradient's share of the partials
    share = (tl.num_programs(0) // slices).to(tl.int64) * 2 * width
    dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
    dgate2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)

    for i in range(end - start):
        position = start + i
        n = sorted_token(position, order_ptr)
        row = row_of(n, index_ptr, tokens_per_row)
        first, last = row_bounds(row, offsets_ptr, tokens_per_row)
        x_offset = token_offset(n, per_batch, x_batch_stride, x_token_stride)
        y_offset = token_offset(n, per_batch, y_batch_stride, y_token_stride)
        y2_offset = token_offset(n, per_batch, y2_batch_stride, y2_token_stride)
        d_offset = token_offset(n, per_batch, dnormed_batch_stride, dnormed_token_stride)
        gate_offset, gate2_offset = row * gate_stride, row * gate2_stride
        scale_offset = row * scale_stride
        rstd = tl.load(rstd_ptr + n)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + n)

        if not WHOLE:
            all_h = tl.zeros([BLOCK_D], dtype=tl.float32)
            all_hx = tl.zeros([BLOCK_D], dtype=tl.float32)
            for column in range(0, width, BLOCK_D):
                there = column + tl.arange(0, BLOCK_D)
                xhat_there, _, _, h_there = _norm_gradient(
                    x_ptr, x_offset, y_ptr, y_offset, y2_ptr, y2_offset, gate_ptr, gate_offset,
                    gate2_ptr, gate2_offset, gate_table_ptr, mean, rstd, dnormed_ptr, d_offset,
                    scale_ptr, scale_offset, scale_table_ptr, weight_ptr, there, there < width, LAW,
                )  # fmt: skip
                all_h += h_there
                all_hx += h_there * xhat_there
        xhat, d, g, h = _norm_gradient(
            x_ptr, x_offset, y_ptr, y_offset, y2_ptr, y2_offset, gate_ptr, gate_offset,
            gate2_ptr, gate2_offset, gate_table_ptr, mean, rstd, dnormed_ptr, d_offset,
            scale_ptr, scale_offset, scale_table_ptr, weight_ptr, cols, mask, LAW,
        )  # fmt: skip
        if WHOLE:
            all_h = h
            all_hx = h * xhat
        dr = h - xhat * (tl.sum(all_hx, axis=0) / width)
        if mean_ptr is not None:
            dr -= tl.sum(all_h, axis=0) / width
        dr *= rstd
        if dresidual_ptr is not None:
            offset = token_offset(n, per_batch, dresidual_batch_stride, dresidual_token_stride)
            dr += load_f32(dresidual_ptr + offset + cols, mask)

        rounded = round_if(xhat, LAW, XHAT, dtype)
        if _DSHIFT & NEEDS:
            dshift += d
        if _DSCALE & NEEDS:
            dscale += d * affine(rounded, weight_ptr, bias_ptr, cols, mask, LAW, dtype)
        if _DWEIGHT & NEEDS:
            dweight += g * rounded
        if _DBIAS & NEEDS:
            dbias += g
        if _DX & NEEDS:
            tl.store(dx_ptr + n * width + cols, dr.to(dx_ptr.dtype.element_ty), mask=mask)
        if _DY & NEEDS:
            _store_branch(dr, dy_ptr, n * width, gate_ptr, gate_offset, gate_table_ptr, cols, mask,
                          LAW)  # fmt: skip
        if _DY2 & NEEDS:
            _store_branch(dr, dy2_ptr, n * width, gate2_ptr, gate2_offset, None, cols, mask, LAW)
        if _DGATE & NEEDS:
            dgate += dr * load_f32(y_ptr + y_offset + cols, mask)
        if _DGATE2 & NEEDS:
            dgate2 += dr * load_f32(y2_ptr + y2_offset + cols, mask)

        # The row ends here, or the block does: store its sums and start anew.
        if (position + 1 == end) | (position + 1 == last):
            flush_four(
                dgate, dgate2, dshift, dscale, dgate_ptr, dgate2_ptr, dshift_ptr, dscale_ptr,
                row, first, last, start, end, block, partial_ptr, share, width, cols, mask,
                _DGATE & NEEDS, _DGATE2 & NEEDS, _DSHIFT & NEEDS, _DSCALE & NEEDS,
            )  # fmt: skip
            dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
            dgate2 = tl.zeros([BLOCK_D], dtype=tl.float32)
            dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
            dscale = tl.zeros([BLOCK_D], dtype=tl.float32)

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block * width + cols, dweight, mask=mask)
    if _DBIAS & NEEDS:
        tl.store(dbias_partial_ptr + block * width + cols, dbias, mask=mask)


def backward_case(width: int) -> AotCase:
    """Gate, shift and scale of a packed batch, all gradients."""
    block_d, _, slices, num_warps = config.backward(32768, width)
    pointers = {
        "dresidual_ptr": "*bf16", "dnormed_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16",
        "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "gate_ptr": "*bf16", "scale_ptr": "*bf16",
        "index_ptr": "*i32", "offsets_ptr": "*i32", "dx_ptr": "*bf16", "dy_ptr": "*bf16",
        "dgate_ptr": "*bf16", "dshift_ptr": "*bf16", "dscale_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    absent = ("y2_ptr", "gate2_ptr", "weight_ptr", "bias_ptr", "gate_table_ptr", "scale_table_ptr",
              "order_ptr", "dy2_ptr", "dgate2_ptr", "dweight_partial_ptr",
              "dbias_partial_ptr")  # fmt: skip
    names = ("dresidual", "dnormed", "x", "y")
    strides = (*(f"{t}_{s}_stride" for t in names for s in ("batch", "token")), "gate_stride",
               "scale_stride")  # fmt: skip
    integers = ("tokens", "width", "per_batch", *strides, "y2_batch_stride", "y2_token_stride",
                "gate2_stride", "tokens_per_row", "block_tokens", "slices")  # fmt: skip
    return AotCase(
        name=f"gate_residual_norm_modulate_bwd_d{width}",
        kernel=gate_residual_norm_modulate_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={
            **dict.fromkeys(absent),
            "NEEDS": DX | DY | DGATE | DSHIFT | DSCALE,
            "LAW": 0,
            "WHOLE": slices == 1,
            "BLOCK_D": block_d,
        },
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
