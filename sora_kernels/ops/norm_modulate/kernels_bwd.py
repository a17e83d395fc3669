"""Triton backward kernel of norm_modulate: everything in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ...aot import AotCase
from .._device import AFFINE, XHAT, load_f32, load_one_plus, load_vectors, row_sums
from .._grouped import flush_four, round_if, run_at, sorted_token, token_offset
from .._launch import SIZES
from . import config

# Which gradients the backward computes; the bits of `needs`, in the order of its results.
DX, DWEIGHT, DBIAS, DSHIFT, DSCALE, DSHIFT2, DSCALE2 = (1 << i for i in range(7))
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)
_DSHIFT, _DSCALE = tl.constexpr(DSHIFT), tl.constexpr(DSCALE)
_DSHIFT2, _DSCALE2 = tl.constexpr(DSHIFT2), tl.constexpr(DSCALE2)


@triton.jit
def _one_plus(
    scale_ptr, table_ptr, offset, cols, mask, LAW: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """1 + scale of one row, or 1."""
    factor = 1.0
    if scale_ptr is not None:
        factor = load_one_plus(scale_ptr, table_ptr, offset + cols, cols, mask, mask, LAW, dtype)
    return factor


@triton.jit
def _token(
    n, dy_ptr, dy_offset, dy2_ptr, dy2_offset, x_ptr, x_offset, mean_ptr, rstd_ptr, weight,
    bias, one_plus, one_plus2, dshift, dscale, dshift2, dscale2, dweight, dbias, dx_ptr, width,
    cols, mask, NEEDS: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Stores dx of token n; returns the sums dshift, dscale, dshift2, dscale2, dweight and dbias
    with what it adds to them."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    x = load_f32(x_ptr + x_offset + cols, mask)
    dy = load_f32(dy_ptr + dy_offset + cols, mask)
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + n)  # outside the mask too, where it meets zeros of dy only
    rstd = tl.load(rstd_ptr + n)
    xhat = x * rstd
    rounded = round_if(xhat, LAW, XHAT, dtype)
    normed = round_if(rounded * weight + bias, LAW, AFFINE, dtype)
    # sums first, so that dy and n need no registers while the row is reduced
    dnormed = dy * one_plus
    dshift += dy
    dscale += dy * normed
    if dy2_ptr is not None:
        dy2 = load_f32(dy2_ptr + dy2_offset + cols, mask)
        dnormed += dy2 * one_plus2
        dshift2 += dy2
        dscale2 += dy2 * normed
    dweight += dnormed * rounded
    dbias += dnormed
    if _DX & NEEDS:
        dxhat = dnormed * weight
        slope, offset = row_sums(dxhat * xhat, dxhat, mean_ptr is not None)
        dx = dxhat - xhat * (slope / width) - offset / width
        tl.store(
            dx_ptr + n.to(tl.int64) * width + cols,
            (dx * rstd).to(dx_ptr.dtype.element_ty),
            mask=mask,
        )
    return dshift, dscale, dshift2, dscale2, dweight, dbias


@triton.jit(**SIZES)
def norm_modulate_bwd_kernel(
    dy_ptr,  # [B, L, D]
    dy2_ptr,  # or None
    x_ptr,  # [B, L, D]
    mean_ptr,  # [N], None for RMS
    rstd_ptr,  # [N]
    weight_ptr,  # [D] or None
    bias_ptr,
    scale_ptr,  # [R, D] or None
    scale_table_ptr,  # [D] or None
    scale2_ptr,
    index_ptr,  # [N] or None
    order_ptr,  # [N] or None
    offsets_ptr,  # [R + 1] or None
    dx_ptr,  # [N, D]
    dweight_partial_ptr,  # [blocks, D] fp32
    dbias_partial_ptr,
    dshift_ptr,  # [R, D]
    dscale_ptr,
    dshift2_ptr,
    dscale2_ptr,
    partial_ptr,  # [4, blocks, 2, D] fp32
    tokens,
    width,
    per_batch,  # L or None
    dy_batch_stride,
    dy_token_stride,
    dy2_batch_stride,
    dy2_token_stride,
    x_batch_stride,
    x_token_stride,
    scale_stride,
    scale2_stride,
    tokens_per_row,
    block_tokens,
    NEEDS: tl.constexpr,
    LAW: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx and the running sums of all other gradients, over one block of sorted tokens.

    With n = xhat * weight + bias and g = dy * (1 + scale): dshift += dy, dscale += dy * n,
    dweight += g * xhat, dbias += g, and for h = g * weight
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat))   (RMS: without mean(h)).

    A block is walked run by run: the tokens of one modulation row. Within a run nothing but the
    streams changes, so its loop is pipelined: the loads of the next tokens are under way, in shared
    memory, while this one is reduced.
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    block = tl.program_id(0)
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < width
    share = tl.num_programs(0).to(tl.int64) * 2 * width  # one gradient's part of the partials
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight, bias = load_vectors(weight_ptr, bias_ptr, cols, mask)

    position = start
    while position < end:
        row, stop = run_at(
            position, end, order_ptr, index_ptr, offsets_ptr, tokens_per_row, GROUPED
        )
        one_plus = _one_plus(
            scale_ptr, scale_table_ptr, row.to(tl.int64) * scale_stride, cols, mask, LAW, dtype
        )
        one_plus2 = _one_plus(
            scale2_ptr, None, row.to(tl.int64) * scale2_stride, cols, mask, LAW, dtype
        )
        dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
        dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
        dshift2 = tl.zeros([BLOCK_D], dtype=tl.float32)
        dscale2 = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i in tl.range(0, stop - position, num_stages=STAGES):
            n = sorted_token(position + i, order_ptr)
            dshift, dscale, dshift2, dscale2, dweight, dbias = _token(
                n,
                dy_ptr, token_offset(n, per_batch, dy_batch_stride, dy_token_stride),
                dy2_ptr, token_offset(n, per_batch, dy2_batch_stride, dy2_token_stride),
                x_ptr, token_offset(n, per_batch, x_batch_stride, x_token_stride),
                mean_ptr, rstd_ptr, weight, bias, one_plus, one_plus2,
                dshift, dscale, dshift2, dscale2, dweight, dbias,
                dx_ptr, width, cols, mask, NEEDS, LAW,
            )  # fmt: skip
        flush_four(
            dshift, dscale, dshift2, dscale2, dshift_ptr, dscale_ptr, dshift2_ptr, dscale2_ptr,
            row, offsets_ptr, tokens_per_row, start, end, block, partial_ptr, share, width, cols,
            mask,
            _DSHIFT & NEEDS, _DSCALE & NEEDS, _DSHIFT2 & NEEDS, _DSCALE2 & NEEDS,
        )  # fmt: skip
        position = stop

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block.to(tl.int64) * width + cols, dweight, mask=mask)
    if _DBIAS & NEEDS:
        tl.store(dbias_partial_ptr + block.to(tl.int64) * width + cols, dbias, mask=mask)


def backward_case(width: int) -> AotCase:
    """Shift and scale of a packed batch."""
    block_d, _, num_warps, stages = config.backward(32768, width, 2, 2)
    pointers = {
        "dy_ptr": "*bf16", "x_ptr": "*bf16", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
        "scale_ptr": "*bf16", "index_ptr": "*i32", "offsets_ptr": "*i32", "dx_ptr": "*bf16",
        "dshift_ptr": "*bf16", "dscale_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    absent = ("dy2_ptr", "weight_ptr", "bias_ptr", "scale_table_ptr", "scale2_ptr", "order_ptr",
              "dweight_partial_ptr", "dbias_partial_ptr", "dshift2_ptr", "dscale2_ptr",
              "per_batch")  # fmt: skip
    strides = ("dy_batch_stride", "dy_token_stride", "x_batch_stride", "x_token_stride",
               "scale_stride")  # fmt: skip
    integers = ("tokens", "width", *strides, "dy2_batch_stride", "dy2_token_stride",
                "scale2_stride", "tokens_per_row", "block_tokens")  # fmt: skip
    return AotCase(
        name=f"norm_modulate_bwd_d{width}",
        kernel=norm_modulate_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={
            **dict.fromkeys(absent),
            "NEEDS": DX | DSHIFT | DSCALE,
            "LAW": 0,
            "GROUPED": True,
            "BLOCK_D": block_d,
            "STAGES": stages,
        },
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
