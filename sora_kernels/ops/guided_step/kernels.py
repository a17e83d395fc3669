"""Triton kernels of guided_step, forward and backward, and their launchers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import load_f32
from .._grouped import rows_of, token_offset
from .._launch import SIZES, cdiv, launch, per_batch, token_strides
from .config import chip_of, choose_config


@triton.jit
def _row_numbers(n, inside, index_ptr, tokens_per_row, guidance_ptr, weight_ptr):
    """Guidance and weight of tokens n."""
    rows = rows_of(n, index_ptr, tokens_per_row, inside)
    guidance = tl.load(guidance_ptr + rows, mask=inside, other=0.0)
    return guidance, tl.load(weight_ptr + rows, mask=inside, other=0.0)


@triton.jit
def _place(slices, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens and columns of a program, neighbours in memory one after the other.

    One number, because a grid's second dimension ends at 65535: one row may be a whole latent.
    """
    pid = tl.program_id(0)
    n = (pid // slices).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    return n, pid % slices * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit(**SIZES)
def _guided_step_fwd_kernel(
    x_ptr,  # [B, L, D]
    cond_ptr,  # [B, L, D]
    uncond_ptr,  # [B, L, D] or None
    guidance_ptr,  # [R] fp32
    weight_ptr,  # [R] fp32
    index_ptr,  # [N] or None
    out_ptr,  # [N, D]
    tokens,
    width,
    slices,
    per_batch,  # L or None
    x_batch_stride,
    x_token_stride,
    cond_batch_stride,
    cond_token_stride,
    uncond_batch_stride,
    uncond_token_stride,
    tokens_per_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x + weight[row] * (uncond + guidance[row] * (cond - uncond))."""
    n, cols = _place(slices, BLOCK_ROWS, BLOCK_D)
    inside = n < tokens
    mask = inside & (cols < width)
    guidance, weight = _row_numbers(n, inside, index_ptr, tokens_per_row, guidance_ptr, weight_ptr)
    v = load_f32(
        cond_ptr + token_offset(n, per_batch, cond_batch_stride, cond_token_stride) + cols, mask
    )
    if uncond_ptr is not None:
        free = load_f32(
            uncond_ptr
            + token_offset(n, per_batch, uncond_batch_stride, uncond_token_stride)
            + cols,
            mask,
        )
        v = free + guidance * (v - free)
    x = load_f32(x_ptr + token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols, mask)
    out = x + weight * v
    tl.store(out_ptr + n * width + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(**SIZES)
def _guided_step_bwd_kernel(
    dout_ptr,  # [B, L, D]
    guidance_ptr,  # [R] fp32
    weight_ptr,  # [R] fp32
    index_ptr,  # [N] or None
    dcond_ptr,  # [N, D] or None
    duncond_ptr,  # [N, D] or None
    tokens,
    width,
    slices,
    per_batch,  # L or None
    dout_batch_stride,
    dout_token_stride,
    tokens_per_row,
    GUIDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dcond = weight * guidance * dout, duncond = weight * (1 - guidance) * dout."""
    n, cols = _place(slices, BLOCK_ROWS, BLOCK_D)
    inside = n < tokens
    mask = inside & (cols < width)
    guidance, weight = _row_numbers(n, inside, index_ptr, tokens_per_row, guidance_ptr, weight_ptr)
    offsets = token_offset(n, per_batch, dout_batch_stride, dout_token_stride) + cols
    dout = load_f32(dout_ptr + offsets, mask)
    if dcond_ptr is not None:
        dcond = dout * weight
        if GUIDED:
            dcond = dout * (weight * guidance)
        tl.store(dcond_ptr + n * width + cols, dcond.to(dcond_ptr.dtype.element_ty), mask=mask)
    if duncond_ptr is not None:
        duncond = dout * (weight * (1.0 - guidance))
        tl.store(
            duncond_ptr + n * width + cols, duncond.to(duncond_ptr.dtype.element_ty), mask=mask
        )


def _grid(tokens: int, width: int, x: Tensor) -> tuple[tuple[int], int, dict[str, Any]]:
    block_rows, block_d, num_warps = choose_config(width, chip_of(x))
    slices = cdiv(width, block_d)
    return (
        (cdiv(tokens, block_rows) * slices,),
        slices,
        {
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
            "num_warps": num_warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        },
    )


def forward(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    weight: Tensor,
    index: Tensor | None,
    tokens_per_row: int,
) -> Tensor:
    """The raw op guided_step_fwd."""
    batch, length, width = x.shape
    out = x.new_empty(x.shape)
    grid, slices, meta = _grid(batch * length, width, x)
    free = cond if uncond is None else uncond  # its strides; its data is not read
    launch(
        _guided_step_fwd_kernel, grid, x.device,
        x, cond, uncond, guidance, weight, index, out, batch * length, width, slices,
        per_batch(x, cond, free), *token_strides(x), *token_strides(cond), *token_strides(free),
        max(tokens_per_row, 1), **meta,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    guidance: Tensor,
    weight: Tensor,
    index: Tensor | None,
    tokens_per_row: int,
    dtype: torch.dtype,
    guided: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """The raw op guided_step_bwd: dcond and duncond; those not in ``needs`` are empty."""
    batch, length, width = dout.shape
    dcond = dout.new_empty(dout.shape if needs & 1 else (0,), dtype=dtype)
    duncond = dout.new_empty(dout.shape if needs & 2 else (0,), dtype=dtype)
    grid, slices, meta = _grid(batch * length, width, dout)
    launch(
        _guided_step_bwd_kernel, grid, dout.device,
        dout, guidance, weight, index, dcond if needs & 1 else None,
        duncond if needs & 2 else None, batch * length, width, slices,
        per_batch(dout), *token_strides(dout), max(tokens_per_row, 1), GUIDED=guided, **meta,
    )  # fmt: skip
    return dcond, duncond


def aot_cases() -> list[AotCase]:
    """fp32 state, bf16 velocities: tokens of 16 channels in 1x2x2 patches, and dense latents."""
    return [case for width in (64, 1024, 4096) for case in _cases(width)]


def _cases(width: int) -> list[AotCase]:
    block_rows, block_d, num_warps = choose_config(width)
    blocks = {"per_batch": None, "BLOCK_ROWS": block_rows, "BLOCK_D": block_d}
    sizes = ("width", "tokens", "slices", "tokens_per_row")
    per_row = {"guidance_ptr": "*fp32", "weight_ptr": "*fp32", "index_ptr": "*i32"}

    def case(
        name: str, kernel: Any, pointers: dict[str, str], strides: tuple[str, ...],
        constexprs: dict[str, object],
    ) -> AotCase:  # fmt: skip
        return AotCase(
            name=f"guided_step_{name}_d{width}",
            kernel=kernel,
            signature={**pointers, **dict.fromkeys((*sizes, *strides), "i32")},
            constexprs={**blocks, **constexprs},
            num_warps=num_warps,
            num_stages=1,
            memory_bound=True,
            divisible=(*pointers, "width", *strides),
        )

    inputs = ("x", "cond", "uncond")
    strides = tuple(f"{name}_{axis}_stride" for name in inputs for axis in ("batch", "token"))
    pointers = {"x_ptr": "*fp32", "cond_ptr": "*bf16", "uncond_ptr": "*bf16", **per_row}
    fwd = case("fwd", _guided_step_fwd_kernel, {**pointers, "out_ptr": "*fp32"}, strides, {})
    pointers = {"dout_ptr": "*fp32", **per_row, "dcond_ptr": "*bf16", "duncond_ptr": "*bf16"}
    strides = ("dout_batch_stride", "dout_token_stride")
    return [fwd, case("bwd", _guided_step_bwd_kernel, pointers, strides, {"GUIDED": True})]
