"""Triton forward kernel of gate_residual_norm_modulate and both launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from ...rows import RowMap
from .._device import (
    GATED,
    PRODUCT,
    RESIDUAL,
    XHAT,
    affine,
    load_f32,
    load_modulation,
    load_one_plus,
)
from .._grouped import finish_rows, round_if, token_offset
from .._launch import launch
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


@triton.jit
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
    per_batch,  # L
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
    if index_ptr is not None:
        rows = tl.load(index_ptr + n, mask=inside, other=0).to(tl.int64)
    else:
        rows = tl.where(inside, n, 0) // tokens_per_row

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
    if scale_ptr is not None:
        offsets = rows * scale_stride + cols
        one_plus = load_one_plus(
            scale_ptr, scale_table_ptr, offsets, cols, mask, cols_mask, LAW, dtype
        )
        out = round_if(out * one_plus, LAW, PRODUCT, dtype)
    if shift_ptr is not None:
        offsets = rows * shift_stride + cols
        out += load_modulation(
            shift_ptr, shift_table_ptr, offsets, cols, mask, cols_mask, LAW, dtype
        )
    tl.store(normed_ptr + n * width + cols, out.to(dtype), mask=mask)  # the rounding of the sum


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _token_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


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
    block_d, block_rows, num_warps = config.forward(width)
    launch(
        _gate_residual_norm_modulate_fwd_kernel,
        (triton.cdiv(tokens, block_rows),),
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
        length,
        *_token_strides(x),
        *_token_strides(y),
        *_token_strides(y2),
        _row_stride(gate),
        _row_stride(gate2),
        _row_stride(shift),
        _row_stride(scale),
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

    def like_rows(bit: int, of: Tensor | None, table: Tensor | None) -> Tensor:
        if not needs & bit or of is None:
            return x.new_empty(0, dtype=torch.float32)
        # A gradient that is summed further, over rows (tables), stays fp32.
        return of.new_empty(of.shape, dtype=of.dtype if table is None else torch.float32)

    dx, dy, dy2 = like_x(DX, x.dtype), like_x(DY, y_dtype), like_x(DY2, y_dtype)
    dgate, dgate2 = like_rows(DGATE, gate, gate_table), like_rows(DGATE2, gate2, None)
    dshift = like_rows(DSHIFT, shift, shift_table)
    dscale = like_rows(DSCALE, scale, scale_table)
    modulations = (dgate, dgate2, dshift, dscale)
    present = {DGATE: gate, DGATE2: gate2, DWEIGHT: weight, DBIAS: bias, DSHIFT: shift,
               DSCALE: scale}  # fmt: skip
    for bit, tensor in present.items():
        if tensor is None:
            needs &= ~bit
    block_d, block_tokens, slices, num_warps = config.backward(tokens, width)
    blocks = triton.cdiv(tokens, block_tokens)
    dweight = x.new_empty(blocks if needs & DWEIGHT else 0, width, dtype=torch.float32)
    dbias = x.new_empty(blocks if needs & DBIAS else 0, width, dtype=torch.float32)
    spans = (index is not None or tokens_per_row != 1) and any(g.numel() > 0 for g in modulations)
    partial = x.new_empty(4 if spans else 0, blocks, 2, width, dtype=torch.float32)
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
        length,
        *_token_strides(dresidual),
        *_token_strides(dnormed),
        *_token_strides(x),
        *_token_strides(y),
        *_token_strides(y2),
        _row_stride(gate),
        _row_stride(gate2),
        _row_stride(scale),
        max(tokens_per_row, 1),
        block_tokens,
        slices,
        NEEDS=needs,
        LAW=law,
        WHOLE=slices == 1,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    per_row = max(tokens_per_row, 1) if index is None else 0
    rows = RowMap(tokens, 0, per_row, index, order, offsets)
    for slot, grad in enumerate(modulations):
        if grad.numel() > 0:
            finish_rows(grad, partial[slot] if spans else partial, rows, block_tokens)
    # torch.sum over the blocks is deterministic: stage two of the vectors.
    return (
        dx if needs & DX else dx.float(),
        dy if needs & DY else dy.float(),
        dy2 if needs & DY2 else dy2.float(),
        dgate,
        dgate2,
        dweight.sum(0) if needs & DWEIGHT else dweight.flatten(),
        dbias.sum(0) if needs & DBIAS else dbias.flatten(),
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
