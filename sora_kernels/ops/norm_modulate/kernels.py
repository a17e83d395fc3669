"""Triton kernels of norm_modulate, forward and backward, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from ...laws import Point
from ...rows import RowMap
from .._grouped import finish_rows, flush, round_if, row_bounds, row_of, token_offset
from .._launch import launch
from . import config

XHAT = tl.constexpr(int(Point.XHAT))
AFFINE = tl.constexpr(int(Point.AFFINE))
TABLE = tl.constexpr(int(Point.TABLE))
ONE_PLUS = tl.constexpr(int(Point.ONE_PLUS))
PRODUCT = tl.constexpr(int(Point.PRODUCT))

# Which gradients the backward computes; the bits of `needs`, in the order of its results.
DX, DWEIGHT, DBIAS, DSHIFT, DSCALE, DSHIFT2, DSCALE2 = (1 << i for i in range(7))
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)
_DSHIFT, _DSCALE = tl.constexpr(DSHIFT), tl.constexpr(DSCALE)
_DSHIFT2, _DSCALE2 = tl.constexpr(DSHIFT2), tl.constexpr(DSCALE2)


@triton.jit
def _add_table(value, table_ptr, cols, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr):
    """A modulation plus its per-block table (adaLN-single), if there is one."""
    if table_ptr is not None:
        table = tl.load(table_ptr + cols, mask=cols_mask, other=0.0).to(tl.float32)
        value = round_if(value + table, LAW, TABLE, dtype)
    return value


@triton.jit
def _one_plus(
    scale_ptr, table_ptr, offsets, cols, mask, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """1 + (scale + table), rounded as the law says."""
    scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = _add_table(scale, table_ptr, cols, cols_mask, LAW, dtype)
    return round_if(1.0 + scale, LAW, ONE_PLUS, dtype)


@triton.jit
def _modulate(
    normed, y_ptr, y_offsets, shift_ptr, shift_stride, scale_ptr, scale_stride,
    shift_table_ptr, scale_table_ptr, rows, cols, mask, cols_mask, LAW: tl.constexpr,
):  # fmt: skip
    """y = (1 + scale[row]) * normed + shift[row], stored."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = normed
    if scale_ptr is not None:
        offsets = rows * scale_stride + cols
        one_plus = _one_plus(scale_ptr, scale_table_ptr, offsets, cols, mask, cols_mask, LAW, dtype)
        y = round_if(y * one_plus, LAW, PRODUCT, dtype)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + rows * shift_stride + cols, mask=mask, other=0.0)
        y += _add_table(shift.to(tl.float32), shift_table_ptr, cols, cols_mask, LAW, dtype)
    tl.store(y_ptr + y_offsets, y.to(dtype), mask=mask)  # the rounding of the sum


@triton.jit
def _norm_modulate_fwd_kernel(
    x_ptr,  # [B, L, D]
    weight_ptr,  # [D] or None, like every pointer below down to index
    bias_ptr,
    shift_ptr,  # [R, D]
    scale_ptr,
    shift_table_ptr,  # [D]
    scale_table_ptr,
    shift2_ptr,
    scale2_ptr,
    index_ptr,  # [N]
    y_ptr,  # [N, D]
    y2_ptr,  # or None
    mean_ptr,  # [N] fp32, None for RMS
    rstd_ptr,  # [N] fp32
    tokens,
    width,
    per_batch,  # L
    x_batch_stride,
    x_token_stride,
    shift_stride,
    scale_stride,
    shift2_stride,
    scale2_stride,
    tokens_per_row,
    eps,
    RMS: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = (1 + scale[row]) * (xhat * weight + bias) + shift[row], BLOCK_ROWS tokens a program.

    adaLN of DiT (arXiv 2212.09748), statistics in fp32 over whole rows held in registers.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = n < tokens
    cols_mask = cols < width
    mask = inside & cols_mask
    x_offsets = token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if not RMS:
        mean = tl.sum(x, axis=1, keep_dims=True) / width
        tl.store(mean_ptr + n, mean, mask=inside)
        x = tl.where(cols_mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd_ptr + n, rstd, mask=inside)

    normed = round_if(x * rstd, LAW, XHAT, dtype)
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + cols, mask=cols_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + cols, mask=cols_mask, other=0.0).to(tl.float32)
    normed = round_if(normed, LAW, AFFINE, dtype)

    if index_ptr is not None:
        rows = tl.load(index_ptr + n, mask=inside, other=0).to(tl.int64)
    else:
        rows = tl.where(inside, n, 0) // tokens_per_row
    y_offsets = n * width + cols
    _modulate(
        normed, y_ptr, y_offsets, shift_ptr, shift_stride, scale_ptr, scale_stride,
        shift_table_ptr, scale_table_ptr, rows, cols, mask, cols_mask, LAW,
    )  # fmt: skip
    if y2_ptr is not None:
        _modulate(
            normed, y2_ptr, y_offsets, shift2_ptr, shift2_stride, scale2_ptr, scale2_stride,
            None, None, rows, cols, mask, cols_mask, LAW,
        )  # fmt: skip


@triton.jit
def _norm_modulate_bwd_kernel(
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
    slots = tl.num_programs(0).to(tl.int64) * 2 * width  # one gradient's share of the partials
    dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
    dshift2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    dscale2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)

    for i in range(end - start):
        position = start + i
        n = position
        if order_ptr is not None:
            n = tl.load(order_ptr + position).to(tl.int64)
        row = row_of(n, index_ptr, tokens_per_row)
        first, last = row_bounds(row, offsets_ptr, tokens_per_row)
        x_offset = token_offset(n, per_batch, x_batch_stride, x_token_stride)
        dy_offset = token_offset(n, per_batch, dy_batch_stride, dy_token_stride)
        x = tl.load(x_ptr + x_offset + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_offset + cols, mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            x = tl.where(mask, x - tl.load(mean_ptr + n), 0.0)
        rstd = tl.load(rstd_ptr + n)
        xhat = x * rstd
        rounded = round_if(xhat, LAW, XHAT, dtype)
        normed = rounded
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            normed *= weight
        if bias_ptr is not None:
            normed += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        normed = round_if(normed, LAW, AFFINE, dtype)

        dnormed = dy
        if scale_ptr is not None:
            offsets = row * scale_stride + cols
            dnormed *= _one_plus(scale_ptr, scale_table_ptr, offsets, cols, mask, mask, LAW, dtype)
        dshift += dy
        dscale += dy * normed
        if dy2_ptr is not None:
            dy2_offset = token_offset(n, per_batch, dy2_batch_stride, dy2_token_stride)
            dy2 = tl.load(dy2_ptr + dy2_offset + cols, mask=mask, other=0.0).to(tl.float32)
            dshift2 += dy2
            dscale2 += dy2 * normed
            if scale2_ptr is not None:
                offsets2 = row * scale2_stride + cols
                dy2 *= _one_plus(scale2_ptr, None, offsets2, cols, mask, mask, LAW, dtype)
            dnormed += dy2
        if _DWEIGHT & NEEDS:
            dweight += dnormed * rounded
        if _DBIAS & NEEDS:
            dbias += dnormed
        if _DX & NEEDS:
            dxhat = dnormed * weight
            dx = dxhat - xhat * (tl.sum(dxhat * xhat, axis=0) / width)
            if mean_ptr is not None:
                dx -= tl.sum(dxhat, axis=0) / width
            tl.store(dx_ptr + n * width + cols, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)

        # The row ends here, or the block does: store its sums and start anew.
        if (position + 1 == end) | (position + 1 == last):
            if _DSHIFT & NEEDS:
                flush(dshift, row, first, last, start, end, block, dshift_ptr, partial_ptr,
                      width, cols, mask)  # fmt: skip
            if _DSCALE & NEEDS:
                flush(dscale, row, first, last, start, end, block, dscale_ptr,
                      partial_ptr + slots, width, cols, mask)  # fmt: skip
            if _DSHIFT2 & NEEDS:
                flush(dshift2, row, first, last, start, end, block, dshift2_ptr,
                      partial_ptr + 2 * slots, width, cols, mask)  # fmt: skip
            if _DSCALE2 & NEEDS:
                flush(dscale2, row, first, last, start, end, block, dscale2_ptr,
                      partial_ptr + 3 * slots, width, cols, mask)  # fmt: skip
            dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
            dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
            dshift2 = tl.zeros([BLOCK_D], dtype=tl.float32)
            dscale2 = tl.zeros([BLOCK_D], dtype=tl.float32)

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block * width + cols, dweight, mask=mask)
    if _DBIAS & NEEDS:
        tl.store(dbias_partial_ptr + block * width + cols, dbias, mask=mask)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    index: Tensor | None,
    tokens_per_row: int,
    eps: float,
    rms: bool,
    law: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op norm_modulate_fwd: (y, y2, mean, rstd); y2 and mean may be empty."""
    batch, length, width = x.shape
    tokens = batch * length
    two = shift2 is not None or scale2 is not None
    y = x.new_empty(x.shape, dtype=out_dtype)
    y2 = x.new_empty(x.shape if two else (0,), dtype=out_dtype)
    mean = x.new_empty(0 if rms else tokens, dtype=torch.float32)
    rstd = x.new_empty(tokens, dtype=torch.float32)
    block_d, block_rows, num_warps = config.forward(width)
    launch(
        _norm_modulate_fwd_kernel,
        (triton.cdiv(tokens, block_rows),),
        x.device,
        x,
        weight,
        bias,
        shift,
        scale,
        shift_table,
        scale_table,
        shift2,
        scale2,
        index,
        y,
        y2 if two else None,
        None if rms else mean,
        rstd,
        tokens,
        width,
        length,
        x.stride(0),
        x.stride(1),
        _row_stride(shift),
        _row_stride(scale),
        _row_stride(shift2),
        _row_stride(scale2),
        max(tokens_per_row, 1),
        eps,
        RMS=rms,
        LAW=law,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    return y, y2, mean, rstd


def backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    tokens_per_row: int,
    rms: bool,
    law: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op norm_modulate_bwd: dx, dweight, dbias, dshift, dscale, dshift2, dscale2.

    Gradients not in ``needs`` are empty tensors.
    """
    batch, length, width = x.shape
    tokens = batch * length

    def grad_of(bit: int, of: Tensor | None, table: Tensor | None) -> Tensor:
        if not needs & bit or of is None:
            return x.new_empty(0, dtype=torch.float32)
        # A gradient that is summed further, over rows (tables), stays fp32.
        return of.new_empty(of.shape, dtype=of.dtype if table is None else torch.float32)

    dshift = grad_of(DSHIFT, shift, shift_table)
    dscale = grad_of(DSCALE, scale, scale_table)
    dshift2 = grad_of(DSHIFT2, shift2, None)
    dscale2 = grad_of(DSCALE2, scale2, None)
    modulations = (dshift, dscale, dshift2, dscale2)
    sums = sum(g.numel() > 0 for g in modulations) + bin(needs & (DWEIGHT | DBIAS)).count("1")
    block_d, block_tokens, num_warps = config.backward(tokens, width, sums)
    blocks = triton.cdiv(tokens, block_tokens)

    dx = x.new_empty(x.shape) if needs & DX else x.new_empty(0, dtype=torch.float32)
    dweight = x.new_empty(blocks if needs & DWEIGHT else 0, width, dtype=torch.float32)
    dbias = x.new_empty(blocks if needs & DBIAS else 0, width, dtype=torch.float32)
    spans = tokens_per_row != 1 and any(g.numel() > 0 for g in modulations)
    partial = x.new_empty(4 if spans else 0, blocks, 2, width, dtype=torch.float32)
    launch(
        _norm_modulate_bwd_kernel,
        (blocks,),
        x.device,
        dy,
        dy2,
        x,
        None if rms else mean,
        rstd,
        weight,
        bias,
        scale,
        scale_table,
        scale2,
        index,
        order,
        offsets,
        dx,
        dweight,
        dbias,
        dshift,
        dscale,
        dshift2,
        dscale2,
        partial,
        tokens,
        width,
        length,
        dy.stride(0),
        dy.stride(1),
        0 if dy2 is None else dy2.stride(0),
        0 if dy2 is None else dy2.stride(1),
        x.stride(0),
        x.stride(1),
        _row_stride(scale),
        _row_stride(scale2),
        max(tokens_per_row, 1),
        block_tokens,
        NEEDS=needs,
        LAW=law,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    rows = RowMap(tokens, 0, max(tokens_per_row, 1) if index is None else 0, index, order, offsets)
    for slot, grad in enumerate(modulations):
        if grad.numel() > 0:
            finish_rows(grad, partial[slot] if spans else partial, rows, block_tokens)
    # torch.sum over the blocks is deterministic: stage two of the vectors.
    return (
        dx,
        dweight.sum(0) if needs & DWEIGHT else dweight.new_empty(0),
        dbias.sum(0) if needs & DBIAS else dbias.new_empty(0),
        *modulations,
    )


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def aot_cases() -> list[AotCase]:
    """Production shapes: the widths of DiT-XL, Wan-1.3B, Hunyuan/Flux and Wan-14B."""
    cases = []
    strides = ("x_batch_stride", "x_token_stride", "shift_stride", "scale_stride")
    for width in (384, 1152, 1536, 3072, 5120):
        block_d, block_rows, num_warps = config.forward(width)
        pointers = {
            "x_ptr": "*bf16", "shift_ptr": "*bf16", "scale_ptr": "*bf16",
            "y_ptr": "*bf16", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
        }  # fmt: skip
        absent = ("weight_ptr", "bias_ptr", "shift_table_ptr", "scale_table_ptr", "shift2_ptr",
                  "scale2_ptr", "index_ptr", "y2_ptr")  # fmt: skip
        integers = ("tokens", "width", "per_batch", *strides, "shift2_stride", "scale2_stride",
                    "tokens_per_row")  # fmt: skip
        for law in (
            (0, int(Point.AFFINE | Point.ONE_PLUS | Point.PRODUCT)) if width == 1536 else (0,)
        ):
            cases.append(
                AotCase(
                    name=f"norm_modulate_fwd_d{width}" + ("_law" if law else ""),
                    kernel=_norm_modulate_fwd_kernel,
                    signature={**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
                    constexprs={
                        **dict.fromkeys(absent),
                        "RMS": False,
                        "LAW": law,
                        "BLOCK_ROWS": block_rows,
                        "BLOCK_D": block_d,
                    },
                    num_warps=num_warps,
                    num_stages=1,
                    memory_bound=True,
                    divisible=(*pointers, "width", *strides),
                    enable_fp_fusion=law == 0,
                )
            )
        cases.append(_backward_case(width))
    return cases


def _backward_case(width: int) -> AotCase:
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
        kernel=_norm_modulate_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={**dict.fromkeys(absent), "NEEDS": needs, "LAW": 0, "BLOCK_D": block_d},
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
