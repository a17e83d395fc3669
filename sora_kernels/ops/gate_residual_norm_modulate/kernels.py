"""Triton forward kernel of gate_residual_norm_modulate and both launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import GATED, RESIDUAL, XHAT, affine, load_f32, load_modulation, modulate
from .._grouped import finish_rows, new_partials, round_if, rows_of, token_offset
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
    DGATE,
    DGATE2,
    DSCALE,
    DSHIFT,
    DWEIGHT,
    DX,
    DY,
    DY2,
    backward_case,
    gate_residual_norm_modulate_bwd_kernel,
)


@triton.jit
def _gated(
    y_ptr, y_offsets, gate_ptr, gate_stride, table_ptr, rows, cols, mask, cols_mask,
    LAW: tl.constexpr,
):  # fmt: skip
    """gate[row] * y, or y alone."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    branch = load_f32(y_ptr + y_offsets, mask)
    if gate_ptr is not None:
        offsets = rows * gate_stride + cols
        gate = load_modulation(gate_ptr, table_ptr, offsets, cols, mask, cols_mask, LAW, dtype)
        branch = round_if(gate * branch, LAW, GATED, dtype)
    return branch


@triton.jit(**SIZES)
def _gate_residual_norm_modulate_fwd_kernel(
    x_ptr,  # [B, L, D]
    y_ptr,  # [B, L, D]
    y2_ptr,  # [B, L, D] or None
    gate_ptr,  # [R, D] or None, like every matrix below
    gate2_ptr,
    weight_ptr,  # [D] or None, like every vector below
    bias_ptr,
    shift_ptr,
    scale_ptr,
    gate_table_ptr,
    shift_table_ptr,
    scale_table_ptr,
    index_ptr,  # [N] or None
    residual_ptr,  # [N, D]
    normed_ptr,  # [N, D]
    mean_ptr,  # [N] fp32, None for RMS
    rstd_ptr,  # [N] fp32
    tokens,
    width,
    per_batch,  # L or None
    x_batch_stride,
    x_token_stride,
    y_batch_stride,
    y_token_stride,
    y2_batch_stride,
    y2_token_stride,
    gate_stride,
    gate2_stride,
    shift_stride,
    scale_stride,
    tokens_per_row,
    eps,
    LAW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = x + gate*y (+ gate2*y2), stored; (1+scale) * (norm(r)*weight+bias) + shift, stored.

    adaLN-Zero of DiT (arXiv 2212.09748), BLOCK_ROWS tokens a program; statistics in fp32 of the
    sum in registers.
    """
    stream: tl.constexpr = residual_ptr.dtype.element_ty
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = n < tokens
    cols_mask = cols < width
    mask = inside & cols_mask
    rows = rows_of(n, index_ptr, tokens_per_row, inside)

    r = load_f32(x_ptr + token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols, mask)
    y_offsets = token_offset(n, per_batch, y_batch_stride, y_token_stride) + cols
    r += _gated(
        y_ptr, y_offsets, gate_ptr, gate_stride, gate_table_ptr, rows, cols, mask, cols_mask, LAW
    )
    r = round_if(r, LAW, RESIDUAL, stream)
    if y2_ptr is not None:
        y_offsets = token_offset(n, per_batch, y2_batch_stride, y2_token_stride) + cols
        r += _gated(
            y2_ptr, y_offsets, gate2_ptr, gate2_stride, None, rows, cols, mask, cols_mask, LAW
        )
        r = round_if(r, LAW, RESIDUAL, stream)
    tl.store(residual_ptr + n * width + cols, r.to(stream), mask=mask)

    if mean_ptr is not None:
        mean = tl.sum(r, axis=1, keep_dims=True) / width
        tl.store(mean_ptr + n, mean, mask=inside)
        r = tl.where(cols_mask, r - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd_ptr + n, rstd, mask=inside)
    out = affine(round_if(r * rstd, LAW, XHAT, dtype), weight_ptr, bias_ptr, cols, cols_mask, LAW,
                 dtype)  # fmt: skip
    out = modulate(out, shift_ptr, shift_stride, scale_ptr, scale_stride, shift_table_ptr,
                   scale_table_ptr, rows, cols, mask, cols_mask, LAW, dtype)  # fmt: skip
    tl.store(normed_ptr + n * width + cols, out.to(dtype), mask=mask)  # the rounding of the sum


def forward(
    x: Tensor,
    y: Tensor,
    y2: Tensor | None,
    gate: Tensor | None,
    gate2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    gate_table: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    index: Tensor | None,
    tokens_per_row: int,
    eps: float,
    rms: bool,
    law: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op gate_residual_norm_modulate_fwd: (residual, normed, mean, rstd)."""
    batch, length, width = x.shape
    tokens = batch * length
    residual = x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=out_dtype)
    mean = x.new_empty(0 if rms else tokens, dtype=torch.float32)
    rstd = x.new_empty(tokens, dtype=torch.float32)
    block_d, block_rows, num_warps = config.forward(width, config.chip_of(x))
    launch(
        _gate_residual_norm_modulate_fwd_kernel,
        (cdiv(tokens, block_rows),),
        x.device,
        x,
        y,
        y2,
        gate,
        gate2,
        weight,
        bias,
        shift,
        scale,
        gate_table,
        shift_table,
        scale_table,
        index,
        residual,
        normed,
        None if rms else mean,
        rstd,
        tokens,
        width,
        per_batch(x, y, y2),
        *token_strides(x),
        *token_strides(y),
        *token_strides(y2),
        row_stride(gate),
        row_stride(gate2),
        row_stride(shift),
        row_stride(scale),
        max(tokens_per_row, 1),
        eps,
        LAW=law,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    return residual, normed, mean, rstd


def backward(
    dresidual: Tensor | None,
    dnormed: Tensor,
    x: Tensor,
    y: Tensor | None,
    y2: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    gate2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    gate_table: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    tokens_per_row: int,
    rms: bool,
    law: int,
    y_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, ...]:
    """The raw op gate_residual_norm_modulate_bwd: dx, dy, dy2, dgate, dgate2, dweight, dbias,
    dshift, dscale; those not in ``needs`` are empty.
    """
    batch, length, width = x.shape
    tokens = batch * length

    def like_x(bit: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(x.shape if needs & bit else (0,), dtype=dtype)

    dx, dy, dy2 = like_x(DX, x.dtype), like_x(DY, y_dtype), like_x(DY2, y_dtype)
    dgate = modulation_grad(x, needs & DGATE, gate, gate_table)
    dgate2 = modulation_grad(x, needs & DGATE2, gate2, None)
    dshift = modulation_grad(x, needs & DSHIFT, shift, shift_table)
    dscale = modulation_grad(x, needs & DSCALE, scale, scale_table)
    modulations = (dgate, dgate2, dshift, dscale)
    present = {DGATE: gate, DGATE2: gate2, DWEIGHT: weight, DBIAS: bias, DSHIFT: shift,
               DSCALE: scale}  # fmt: skip
    for bit, tensor in present.items():
        if tensor is None:
            needs &= ~bit
    kept = bin(needs & (DGATE | DGATE2 | DWEIGHT | DBIAS | DSHIFT | DSCALE)).count("1")
    kept += sum(t is not None for t in (gate, gate2, scale, weight, bias))
    streams = 2 + sum(t is not None for t in (dresidual, y, y2))
    block_d, block_tokens, slices, num_warps, stages = config.backward(
        tokens, width, streams, x.element_size(), config.chip_of(x)
    )
    blocks = cdiv(tokens, block_tokens)
    grouped = any(t is not None for t in (gate, gate2, shift, scale))
    dweight = vector_partials(x, needs & DWEIGHT, blocks, width)
    dbias = vector_partials(x, needs & DBIAS, blocks, width)
    partial = new_partials(modulations, index, tokens_per_row, blocks, width)
    launch(
        gate_residual_norm_modulate_bwd_kernel,
        (blocks * slices,),
        x.device,
        dresidual,
        dnormed,
        x,
        y,
        y2,
        None if rms else mean,
        rstd,
        gate,
        gate2,
        weight,
        bias,
        scale,
        gate_table,
        scale_table,
        index,
        order,
        offsets,
        dx,
        dy,
        dy2,
        dgate,
        dgate2,
        dshift,
        dscale,
        dweight,
        dbias,
        partial,
        tokens,
        width,
        per_batch(dresidual, dnormed, x, y, y2),
        *token_strides(dresidual),
        *token_strides(dnormed),
        *token_strides(x),
        *token_strides(y),
        *token_strides(y2),
        row_stride(gate),
        row_stride(gate2),
        row_stride(scale),
        max(tokens_per_row, 1),
        block_tokens,
        slices,
        NEEDS=needs,
        LAW=law,
        GROUPED=grouped,
        WHOLE=slices == 1,
        BLOCK_D=block_d,
        STAGES=run_stages(stages, grouped, index, tokens_per_row),
        num_warps=num_warps,
        num_stages=1,
        maxnreg=config.most_registers(kept),
        enable_fp_fusion=law == 0,
    )
    finish_rows(modulations, partial, offsets, tokens_per_row, block_tokens)
    return (
        dx if needs & DX else dx.float(),
        dy if needs & DY else dy.float(),
        dy2 if needs & DY2 else dy2.float(),
        dgate,
        dgate2,
        vector_grad(dweight, needs & DWEIGHT),
        vector_grad(dbias, needs & DBIAS),
        dshift,
        dscale,
    )


def aot_cases() -> list[AotCase]:
    """Production shapes: the widths of DiT-XL, Wan-1.3B, Hunyuan/Flux and Wan-14B."""
    cases = []
    for width in (384, 1152, 1536, 3072, 5120):
        cases.append(_forward_case(width))
        cases.append(backward_case(width))
    return cases


def _forward_case(width: int) -> AotCase:
    block_d, block_rows, num_warps = config.forward(width)
    pointers = {
        "x_ptr": "*bf16", "y_ptr": "*bf16", "gate_ptr": "*bf16", "shift_ptr": "*bf16",
        "scale_ptr": "*bf16", "residual_ptr": "*bf16", "normed_ptr": "*bf16",
        "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
    }  # fmt: skip
    absent = ("y2_ptr", "gate2_ptr", "weight_ptr", "bias_ptr", "gate_table_ptr",
              "shift_table_ptr", "scale_table_ptr", "index_ptr")  # fmt: skip
    strides = ("x_batch_stride", "x_token_stride", "y_batch_stride", "y_token_stride",
               "gate_stride", "shift_stride", "scale_stride")  # fmt: skip
    integers = ("tokens", "width", "per_batch", *strides, "y2_batch_stride", "y2_token_stride",
                "gate2_stride", "tokens_per_row")  # fmt: skip
    return AotCase(
        name=f"gate_residual_norm_modulate_fwd_d{width}",
        kernel=_gate_residual_norm_modulate_fwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
        constexprs={
            **dict.fromkeys(absent), "LAW": 0, "BLOCK_ROWS": block_rows, "BLOCK_D": block_d
        },
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )  # fmt: skip
