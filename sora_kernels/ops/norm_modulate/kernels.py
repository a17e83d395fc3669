"""Triton forward kernel of norm_modulate and both launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from ...laws import Point
from .._device import XHAT, affine, load_f32, modulate
from .._grouped import finish_case, finish_rows, new_partials, round_if, rows_of, token_offset
from .._launch import (
    SIZES,
    cdiv,
    launch,
    modulation_grad,
    per_batch,
    row_stride,
    run_stages,
    token_strides,
    vector_grad,
    vector_partials,
)
from . import config
from .kernels_bwd import (
    DBIAS,
    DSCALE,
    DSCALE2,
    DSHIFT,
    DSHIFT2,
    DWEIGHT,
    DX,
    backward_case,
    norm_modulate_bwd_kernel,
)


@triton.jit(**SIZES)
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
    per_batch,  # L or None
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
    x = load_f32(x_ptr + x_offsets, mask)
    if not RMS:
        mean = tl.sum(x, axis=1, keep_dims=True) / width
        tl.store(mean_ptr + n, mean, mask=inside)
        x = tl.where(cols_mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd_ptr + n, rstd, mask=inside)

    normed = round_if(x * rstd, LAW, XHAT, dtype)
    normed = affine(normed, weight_ptr, bias_ptr, cols, cols_mask, LAW, dtype)
    rows = rows_of(n, index_ptr, tokens_per_row, inside)
    y = modulate(normed, shift_ptr, shift_stride, scale_ptr, scale_stride, shift_table_ptr,
                 scale_table_ptr, rows, cols, mask, cols_mask, LAW, dtype)  # fmt: skip
    tl.store(y_ptr + n * width + cols, y.to(dtype), mask=mask)
    if y2_ptr is not None:
        y2 = modulate(normed, shift2_ptr, shift2_stride, scale2_ptr, scale2_stride, None, None,
                      rows, cols, mask, cols_mask, LAW, dtype)  # fmt: skip
        tl.store(y2_ptr + n * width + cols, y2.to(dtype), mask=mask)


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
    block_d, block_rows, num_warps = config.forward(width, config.chip_of(x))
    launch(
        _norm_modulate_fwd_kernel,
        (cdiv(tokens, block_rows),),
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
        per_batch(x),
        *token_strides(x),
        row_stride(shift),
        row_stride(scale),
        row_stride(shift2),
        row_stride(scale2),
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

    dshift = modulation_grad(x, needs & DSHIFT, shift, shift_table)
    dscale = modulation_grad(x, needs & DSCALE, scale, scale_table)
    dshift2 = modulation_grad(x, needs & DSHIFT2, shift2, None)
    dscale2 = modulation_grad(x, needs & DSCALE2, scale2, None)
    modulations = (dshift, dscale, dshift2, dscale2)
    block_d, block_tokens, num_warps, stages = config.backward(
        tokens, width, 2 + (dy2 is not None), x.element_size(), config.chip_of(x)
    )
    blocks = cdiv(tokens, block_tokens)
    grouped = any(t is not None for t in (shift, scale, shift2, scale2))

    dx = x.new_empty(x.shape) if needs & DX else x.new_empty(0, dtype=torch.float32)
    dweight = vector_partials(x, needs & DWEIGHT, blocks, width)
    dbias = vector_partials(x, needs & DBIAS, blocks, width)
    partial = new_partials(modulations, index, tokens_per_row, blocks, width)
    launch(
        norm_modulate_bwd_kernel,
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
        per_batch(dy, dy2, x),
        *token_strides(dy),
        *token_strides(dy2),
        *token_strides(x),
        row_stride(scale),
        row_stride(scale2),
        max(tokens_per_row, 1),
        block_tokens,
        NEEDS=needs,
        LAW=law,
        GROUPED=grouped,
        BLOCK_D=block_d,
        STAGES=run_stages(stages, grouped, index, tokens_per_row),
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    finish_rows(modulations, partial, offsets, tokens_per_row, block_tokens)
    return (
        dx,
        vector_grad(dweight, needs & DWEIGHT),
        vector_grad(dbias, needs & DBIAS),
        *modulations,
    )


def aot_cases() -> list[AotCase]:
    """Production shapes: the widths of DiT-XL, Wan-1.3B, Hunyuan/Flux and Wan-14B."""
    cases = [finish_case()]
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
        cases.append(backward_case(width))
    return cases
