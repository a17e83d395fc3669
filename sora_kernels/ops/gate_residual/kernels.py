"""Triton kernels of gate_residual, forward and backward, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import (
    AFFINE,
    GATED,
    TANH,
    XHAT,
    affine,
    load_f32,
    load_modulation,
    load_vectors,
    row_sums,
    tanh,
    tanh_slope,
)
from .._grouped import (
    finish_rows,
    flush,
    new_partials,
    round_if,
    row_bounds,
    rows_of,
    run_at,
    sorted_token,
    token_offset,
)
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

# Bits of `needs`, in the order of the backward's results.
DY, DGATE, DWEIGHT = 1, 2, 4
_DY, _DGATE, _DWEIGHT = tl.constexpr(DY), tl.constexpr(DGATE), tl.constexpr(DWEIGHT)
_LAYER = tl.constexpr(2)  # values of NORM: 0 none, 1 RMS, 2 LayerNorm


@triton.jit(**SIZES)
def _gate_residual_fwd_kernel(
    x_ptr,  # [B, L, D]
    y_ptr,  # [B, L, D]
    gate_ptr,  # [R, D] or None
    gate_table_ptr,  # [D] or None
    weight_ptr,  # [D] or None
    index_ptr,  # [N] or None
    out_ptr,  # [N, D]
    mean_ptr,  # [N] fp32, LayerNorm only
    rstd_ptr,  # [N] fp32, with a norm only
    tokens,
    width,
    per_batch,  # L or None
    x_batch_stride,
    x_token_stride,
    y_batch_stride,
    y_token_stride,
    gate_stride,
    tokens_per_row,
    eps,
    WITH_TANH: tl.constexpr,
    NORM: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x + act(gate[row]) * (norm(y) * weight) for BLOCK_ROWS tokens and BLOCK_D columns.

    adaLN-Zero's gate (arXiv 2212.09748); with tanh and norm the sandwich of Mochi and Z-Image.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = n < tokens
    cols_mask = cols < width
    mask = inside & cols_mask
    y_offsets = token_offset(n, per_batch, y_batch_stride, y_token_stride) + cols
    branch = load_f32(y_ptr + y_offsets, mask)
    if NORM > 0:
        if NORM == _LAYER:
            mean = tl.sum(branch, axis=1, keep_dims=True) / width
            tl.store(mean_ptr + n, mean, mask=inside)
            branch = tl.where(cols_mask, branch - mean, 0.0)
        square = tl.sum(branch * branch, axis=1, keep_dims=True)
        rstd = 1.0 / tl.sqrt(square / width + eps)
        tl.store(rstd_ptr + n, rstd, mask=inside)
        branch = round_if(branch * rstd, LAW, XHAT, dtype)
        branch = affine(branch, weight_ptr, None, cols, cols_mask, LAW, dtype)
    if gate_ptr is not None:
        rows = rows_of(n, index_ptr, tokens_per_row, inside)
        gate = load_modulation(
            gate_ptr, gate_table_ptr, rows * gate_stride + cols, cols, mask, cols_mask, LAW, dtype
        )
        if WITH_TANH:
            gate = round_if(tanh(gate), LAW, TANH, dtype)
        branch = round_if(gate * branch, LAW, GATED, dtype)
    x_offsets = token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols
    out = load_f32(x_ptr + x_offsets, mask) + branch
    tl.store(out_ptr + n * width + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(**SIZES)
def _gate_residual_bwd_kernel(
    dout_ptr,  # [B, L, D]
    y_ptr,  # [B, L, D]; None if only gate * dout is wanted
    mean_ptr,  # [N], None unless LayerNorm
    rstd_ptr,  # [N], None without a norm
    gate_ptr,  # [R, D] or None
    gate_table_ptr,  # [D] or None
    weight_ptr,  # [D] or None
    index_ptr,  # [N] or None
    order_ptr,  # [N] or None
    offsets_ptr,  # [R + 1] or None
    dy_ptr,  # [N, D]
    dgate_ptr,  # [R, D]
    dweight_partial_ptr,  # [blocks, D] fp32
    partial_ptr,  # [blocks, 2, D] fp32
    tokens,
    width,
    per_batch,
    dout_batch_stride,
    dout_token_stride,
    y_batch_stride,
    y_token_stride,
    gate_stride,
    tokens_per_row,
    block_tokens,
    NEEDS: tl.constexpr,
    WITH_TANH: tl.constexpr,
    NORM: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dy and the running sums of dgate and dweight, over one block of sorted tokens.

    For b = norm(y) * weight and h = dout * act(gate) * weight: dgate += dout * b * act'(gate),
    dweight += dout * act(gate) * xhat, dy = rstd * (h - mean(h) - xhat * mean(h * xhat))
    (RMS: without mean(h); no norm: dy = h).

    A block is walked run by run: the gate and its tanh are those of a row, and the loop over the
    row's tokens is pipelined.
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    block = tl.program_id(0)
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < width
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight, _ = load_vectors(weight_ptr, None, cols, mask)

    position = start
    while position < end:
        row, stop = run_at(
            position, end, order_ptr, index_ptr, offsets_ptr, tokens_per_row, gate_ptr is not None
        )
        dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
        gate = 1.0
        gate_offsets = row.to(tl.int64) * gate_stride + cols
        if gate_ptr is not None:
            gate = load_modulation(
                gate_ptr, gate_table_ptr, gate_offsets, cols, mask, mask, LAW, dtype
            )
            if WITH_TANH:
                gate = round_if(tanh(gate), LAW, TANH, dtype)

        for i in tl.range(0, stop - position, num_stages=STAGES):
            n = sorted_token(position + i, order_ptr)
            dout_offset = token_offset(n, per_batch, dout_batch_stride, dout_token_stride)
            dout = load_f32(dout_ptr + dout_offset + cols, mask)
            dbranch = dout * gate
            branch = 0.0
            if y_ptr is not None:
                y_offset = token_offset(n, per_batch, y_batch_stride, y_token_stride)
                branch = load_f32(y_ptr + y_offset + cols, mask)
            if NORM > 0:
                if mean_ptr is not None:
                    branch -= tl.load(mean_ptr + n)
                rstd = tl.load(rstd_ptr + n)
                xhat = branch * rstd
                rounded = round_if(xhat, LAW, XHAT, dtype)
                dweight += dbranch * rounded
                branch = round_if(rounded * weight, LAW, AFFINE, dtype)
                dbranch *= weight
            dgate += dout * branch
            if NORM > 0:
                along, mean = row_sums(dbranch * xhat, dbranch, mean_ptr is not None)
                dbranch = (dbranch - xhat * (along / width) - mean / width) * rstd
            if _DY & NEEDS:
                dy_offsets = n.to(tl.int64) * width + cols
                tl.store(dy_ptr + dy_offsets, dbranch.to(dtype), mask=mask)

        if _DGATE & NEEDS:
            if WITH_TANH:  # the gate is loaded again: its slope would cost the loop registers
                gate = load_modulation(
                    gate_ptr, gate_table_ptr, gate_offsets, cols, mask, mask, LAW, dtype
                )
                dgate *= tanh_slope(gate)
            first, last = row_bounds(row, offsets_ptr, tokens_per_row)
            flush(dgate, row, first, last, start, end, block, dgate_ptr, partial_ptr,
                  width, cols, mask)  # fmt: skip
        position = stop

    if _DWEIGHT & NEEDS:
        tl.store(dweight_partial_ptr + block.to(tl.int64) * width + cols, dweight, mask=mask)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    weight: Tensor | None,
    index: Tensor | None,
    tokens_per_row: int,
    tanh: bool,
    norm: int,
    eps: float,
    law: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op gate_residual_fwd: (out, mean, rstd); the statistics may be empty."""
    batch, length, width = x.shape
    tokens = batch * length
    out = x.new_empty(x.shape)
    mean = x.new_empty(tokens if norm == 2 else 0, dtype=torch.float32)
    rstd = x.new_empty(tokens if norm else 0, dtype=torch.float32)
    block_d, block_rows, num_warps = config.forward(width, norm > 0, config.chip_of(x))
    launch(
        _gate_residual_fwd_kernel,
        (cdiv(tokens, block_rows), cdiv(width, block_d)),
        x.device,
        x,
        y,
        gate,
        gate_table,
        weight,
        index,
        out,
        mean if norm == 2 else None,
        rstd if norm else None,
        tokens,
        width,
        per_batch(x, y),
        *token_strides(x),
        *token_strides(y),
        row_stride(gate),
        max(tokens_per_row, 1),
        eps,
        WITH_TANH=tanh,
        NORM=norm,
        LAW=law,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    return out, mean, rstd


def backward(
    dout: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    weight: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    tokens_per_row: int,
    tanh: bool,
    norm: int,
    law: int,
    y_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op gate_residual_bwd: dy, dgate, dweight; those not in ``needs`` are empty."""
    batch, length, width = dout.shape
    tokens = batch * length
    if gate is None:
        needs &= ~DGATE
    if weight is None:
        needs &= ~DWEIGHT
    block_d, block_tokens, num_warps, stages = config.backward(
        tokens, width, norm > 0, dout.element_size(), config.chip_of(dout)
    )
    blocks = cdiv(tokens, block_tokens)

    dy = dout.new_empty(dout.shape if needs & DY else (0,), dtype=y_dtype)
    dgate = modulation_grad(dout, needs & DGATE, gate, gate_table)
    partial = new_partials((dgate,), index, tokens_per_row, blocks, width)
    dweight = vector_partials(dout, needs & DWEIGHT, blocks, width)
    launch(
        _gate_residual_bwd_kernel,
        (blocks, cdiv(width, block_d)),
        dout.device,
        dout,
        y,
        mean if norm == 2 else None,
        rstd if norm else None,
        gate,
        gate_table,
        weight,
        index,
        order,
        offsets,
        dy,
        dgate,
        dweight,
        partial,
        tokens,
        width,
        per_batch(dout, y),
        *token_strides(dout),
        *token_strides(y),
        row_stride(gate),
        max(tokens_per_row, 1),
        block_tokens,
        NEEDS=needs,
        WITH_TANH=tanh,
        NORM=norm,
        LAW=law,
        BLOCK_D=block_d,
        STAGES=run_stages(stages, gate is not None, index, tokens_per_row),
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=law == 0,
    )
    finish_rows((dgate,), partial, offsets, tokens_per_row, block_tokens)
    return dy if needs & DY else dy.float(), dgate, vector_grad(dweight, needs & DWEIGHT)


def aot_cases() -> list[AotCase]:
    """Plain gate and Mochi's sandwich at the widths of DiT-XL, Wan, Hunyuan and Flux."""
    cases = []
    for width in (384, 1152, 1536, 3072, 5120):
        for sandwich in (False, True):
            cases.append(_forward_case(width, sandwich))
            cases.append(_backward_case(width, sandwich))
    return cases


def _case_name(direction: str, width: int, sandwich: bool) -> str:
    return f"gate_residual_{direction}_d{width}" + ("_sandwich" if sandwich else "")


def _forward_case(width: int, sandwich: bool) -> AotCase:
    block_d, block_rows, num_warps = config.forward(width, sandwich)
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16", "gate_ptr": "*bf16", "out_ptr": "*bf16"}
    if sandwich:
        pointers |= {"rstd_ptr": "*fp32"}
    absent = ("gate_table_ptr", "weight_ptr", "index_ptr", "mean_ptr", "rstd_ptr")
    strides = ("x_batch_stride", "x_token_stride", "y_batch_stride", "y_token_stride",
               "gate_stride")  # fmt: skip
    integers = ("tokens", "width", "per_batch", *strides, "tokens_per_row")
    return AotCase(
        name=_case_name("fwd", width, sandwich),
        kernel=_gate_residual_fwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
        constexprs={
            **{name: None for name in absent if name not in pointers},
            "WITH_TANH": sandwich,
            "NORM": int(sandwich),
            "LAW": 0,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )


def _backward_case(width: int, sandwich: bool) -> AotCase:
    block_d, _, num_warps, stages = config.backward(32768, width, sandwich, 2)
    pointers = {
        "dout_ptr": "*bf16", "y_ptr": "*bf16", "gate_ptr": "*bf16", "index_ptr": "*i32",
        "offsets_ptr": "*i32", "dy_ptr": "*bf16", "dgate_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    if sandwich:
        pointers |= {"rstd_ptr": "*fp32"}
    absent = ("mean_ptr", "rstd_ptr", "gate_table_ptr", "weight_ptr", "order_ptr",
              "dweight_partial_ptr", "per_batch")  # fmt: skip
    strides = ("dout_batch_stride", "dout_token_stride", "y_batch_stride", "y_token_stride",
               "gate_stride")  # fmt: skip
    integers = ("tokens", "width", *strides, "tokens_per_row", "block_tokens")
    return AotCase(
        name=_case_name("bwd", width, sandwich),
        kernel=_gate_residual_bwd_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={
            **{name: None for name in absent if name not in pointers},
            "NEEDS": DY | DGATE,
            "WITH_TANH": sandwich,
            "NORM": int(sandwich),
            "LAW": 0,
            "BLOCK_D": block_d,
            "STAGES": stages,
        },
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
