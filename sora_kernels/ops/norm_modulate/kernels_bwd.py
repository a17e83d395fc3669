"""Triton backward kernel of norm_modulate: everything in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ...aot import AotCase
from .._device import XHAT, affine, load_f32, load_one_plus
from .._grouped import flush_four, round_if, row_bounds, row_of, sorted_token, token_offset
from . import config

# Which gradients the backward computes; the bits of `needs`, in the order of its results.
DX, DWEIGHT, DBIAS, DSHIFT, DSCALE, DSHIFT2, DSCALE2 = (1 << i for i in range(7))
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)
_DSHIFT, _DSCALE = tl.constexpr(DSHIFT), tl.constexpr(DSCALE)
_DSHIFT2, _DSCALE2 = tl.constexpr(DSHIFT2), tl.constexpr(DSCALE2)


@triton.jit
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
    per_batch,
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
    BLOCK_D: tl.constexpr,
):
    """dx and the running sums of all other gradients, over one block of sorted tokens.

    With n = xhat * weight + bias and g = dy * (1 + scale): dshift += dy, dscale += dy * n,
    dweight += g * xhat, dbias += g, and for h = g * weight
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat))   (RMS: without mean(h)).
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < width
    share = tl.num_programs(0).to(tl.int64) * 2 * width  # one gradient's part of the partials
    dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
    dshift2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)

    for i in range(end - start):
        position = start + i
        n = sorted_token(position, order_ptr)
        row = row_of(n, index_ptr, tokens_per_row)
        first, last = row_bounds(row, offsets_ptr, tokens_per_row)
        x_offset = token_offset(n, per_batch, x_batch_stride, x_token_stride)
        dy_offset = token_offset(n, per_batch, dy_batch_stride, dy_token_stride)
        x = load_f32(x_ptr + x_offset + cols, mask)
        dy = load_f32(dy_ptr + dy_offset + cols, mask)
        if mean_ptr is not None:
            x = tl.where(mask, x - tl.load(mean_ptr + n), 0.0)
        rstd = tl.load(rstd_ptr + n)
        xhat = x * rstd
        rounded = round_if(xhat, LAW, XHAT, dtype)
        normed = affine(rounded, weight_ptr, bias_ptr, cols, mask, LAW, dtype)

        dnormed = dy
        if scale_ptr is not None:
            offsets = row * scale_stride + cols
            dnormed *= load_one_plus(
                scale_ptr, scale_table_ptr, offsets, cols, mask, mask, LAW, dtype
            )
        dshift += dy
        dscale += dy * normed
        if dy2_ptr is not None:
            dy2_offset = token_offset(n, per_batch, dy2_batch_stride, dy2_token_stride)
            dy2 = load_f32(dy2_ptr + dy2_offset + cols, mask)
            dshift2 += dy2
            dscale2 += dy2 * normed
            if scale2_ptr is not None:
                offsets2 = row * scale2_stride + cols
                dy2 *= load_one_plus(scale2_ptr, None, offsets2, cols, mask, mask, LAW, dtype)
            dnormed += dy2
        if _DWEIGHT & NEEDS:
            dweight += dnormed * rounded
        if _DBIAS & NEEDS:
            dbias += dnormed
        if _DX & NEEDS:
            dxhat = dnormed
            if weight_ptr is not None:
                dxhat *= load_f32(weight_ptr + cols, mask)
            dx = dxhat - xhat * (tl.sum(dxhat * xhat, axis=0) / width)
            if mean_ptr is not None:
                dx -= tl.sum(dxhat, axis=0) / width
            tl.store(dx_ptr + n * width + cols, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)

        # The row ends here, or the block does: store its sums and start anew.
        if (position + 1 == end) | (position + 1 == last):
            flush_four(
                dshift, dscale, dshift2, dscale2, dshift_ptr, dscale_ptr, dshift2_ptr, dscale2_ptr,
                row, first, last, start, end, block, partial_ptr, share, width, cols, mask,
                _DSHIFT & NEEDS, _DSCALE & NEEDS, _DSHIFT2 & NEEDS, _DSCALE2 & NEEDS,
            )  # fmt: skip
            dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
            dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
            dshift2 = tl.zeros([BLOCK_D], dtype=tl.float32)
            dscale2 = tl.zeros([BLOCK_D], dtype=tl.float32)

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block * width + cols, dweight, mask=mask)
    if _DBIAS & NEEDS:
        tl.store(dbias_partial_ptr + block * width + cols, dbias, mask=mask)


def backward_case(width: int) -> AotCase:
    needs = DX | DSHIFT | DSCALE
    block_d, _, num_warps = config.backward(32768, width, sums=2)
    pointers = {
        "dy_ptr": "*bf16", "x_ptr": "*bf16", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
        "scale_ptr": "*bf16", "index_ptr": "*i32", "offsets_ptr": "*i32", "dx_ptr": "*bf16",
        "dshift_ptr": "*bf16", "dscale_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    absent = ("dy2_ptr", "weight_ptr", "bias_ptr", "scale_table_ptr", "scale2_ptr", "order_ptr",
              "dweight_partial_ptr", "dbias_partial_ptr", "dshift2_ptr", "dscale2_ptr")  # fmt: skip
    strides = ("dy_batch_stride", "dy_token_stride", "x_batch_stride", "x_token_stride",
               "scale_stride")  # fmt: skip
    integers = ("tokens", "width", "per_batch", *strides, "dy2_batch_stride", "dy2_token_stride",
                "scale2_stride", "tokens_per_row", "block_tokens")  # fmt: skip
    return AotCase(
        name=f"norm_modulate_bwd_d{width}",
        kernel=norm_modulate_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={**dict.fromkeys(absent), "NEEDS": needs, "LAW": 0, "BLOCK_D": block_d},
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
