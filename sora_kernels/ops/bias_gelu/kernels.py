"""Triton kernels of bias_gelu, forward and backward, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import divide, exp, load_f32, load_vectors
from .._grouped import token_offset
from .._launch import SIZES, cdiv, launch, per_batch, token_strides
from . import config

_TWO_C = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.07135481627260025)  # 2 sqrt(2 / pi) * 0.044715


@triton.jit
def _half_gate(u):
    """s = (1 + tanh z) / 2 = 1 / (1 + e^-2z) and s (1 - s), without differences that cancel."""
    twice = u * (u * u * _CUBIC + _TWO_C)
    e = exp(-tl.abs(twice))
    larger = divide(1.0, 1.0 + e)  # of s and 1 - s; the other one is e times that
    smaller = e * larger
    return tl.where(twice < 0.0, smaller, larger), smaller * larger


@triton.jit(**SIZES)
def _bias_gelu_fwd_kernel(
    x_ptr,  # [B, L, D]
    bias_ptr,  # [D] or None
    y_ptr,  # [N, D]
    tokens,
    width,
    per_batch,  # L or None
    x_batch_stride,
    x_token_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = gelu(x + bias), tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    cols_mask = cols < width
    mask = (n < tokens) & cols_mask
    x_offsets = token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols
    _, bias = load_vectors(None, bias_ptr, cols, cols_mask)
    u = load_f32(x_ptr + x_offsets, mask) + bias
    s, _ = _half_gate(u)
    y = u * s
    tl.store(y_ptr + n * width + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(**SIZES)
def _bias_gelu_bwd_kernel(
    dy_ptr,  # [B, L, D]
    x_ptr,  # [B, L, D]
    bias_ptr,  # [D] or None
    dx_ptr,  # [N, D]
    dbias_partial_ptr,  # [blocks, D] fp32 or None
    tokens,
    width,
    per_batch,  # L or None
    dy_batch_stride,
    dy_token_stride,
    x_batch_stride,
    x_token_stride,
    block_tokens,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = dy (s + u s (1 - s) (2z)') with s = (1 + tanh z) / 2; the block's sum of dx.

    Every place of a tile of BLOCK_ROWS tokens keeps its own sum, and the loads of the next tiles
    are under way, in shared memory, while this one is computed.
    """
    block = tl.program_id(0).to(tl.int64)
    start = block * block_tokens
    end = tl.minimum(start + block_tokens, tokens)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    cols_mask = cols < width
    _, bias = load_vectors(None, bias_ptr, cols, cols_mask)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], dtype=tl.float32)
    for i in tl.range(0, tl.cdiv((end - start).to(tl.int32), BLOCK_ROWS), num_stages=STAGES):
        n = start + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (n < end) & cols_mask
        x_offsets = token_offset(n, per_batch, x_batch_stride, x_token_stride) + cols
        dy_offsets = token_offset(n, per_batch, dy_batch_stride, dy_token_stride) + cols
        u = load_f32(x_ptr + x_offsets, mask) + bias
        s, slope = _half_gate(u)
        inner = slope * u * (u * u * (3.0 * _CUBIC) + _TWO_C)
        dx = load_f32(dy_ptr + dy_offsets, mask) * (s + inner)
        tl.store(dx_ptr + n * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    if dbias_partial_ptr is not None:
        partial = dbias_partial_ptr + block * width + cols
        tl.store(partial, tl.sum(total, axis=0, keep_dims=True), mask=cols_mask)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """The raw op bias_gelu_fwd."""
    batch, length, width = x.shape
    y = x.new_empty(x.shape)
    block_rows, block_d, num_warps = config.forward(width, config.chip_of(x))
    launch(
        _bias_gelu_fwd_kernel,
        (cdiv(batch * length, block_rows), cdiv(width, block_d)),
        x.device,
        x,
        bias,
        y,
        batch * length,
        width,
        per_batch(x),
        *token_strides(x),
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, need_dbias: bool) -> tuple[Tensor, Tensor]:
    """The raw op bias_gelu_bwd: dx, and dbias in fp32 (empty if not wanted)."""
    batch, length, width = x.shape
    tokens = batch * length
    tile = config.backward(tokens, width, x.element_size(), config.chip_of(x))
    blocks = cdiv(tokens, tile.block_tokens)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(blocks if need_dbias else 0, width, dtype=torch.float32)
    launch(
        _bias_gelu_bwd_kernel,
        (blocks, cdiv(width, tile.block_d)),
        x.device,
        dy,
        x,
        bias,
        dx,
        partial if need_dbias else None,
        tokens,
        width,
        per_batch(dy, x),
        *token_strides(dy),
        *token_strides(x),
        tile.block_tokens,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_D=tile.block_d,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    # torch.sum over the blocks is deterministic: stage two.
    return dx, partial.sum(0) if need_dbias else partial.flatten()


def aot_cases() -> list[AotCase]:
    """MLP widths of DiT-S, DiT-XL, Wan 1.3B and Flux."""
    return [case for width in (1536, 4608, 8960, 12288) for case in _cases(width)]


def _cases(width: int) -> list[AotCase]:
    block_rows, block_d, num_warps = config.forward(width)
    pointers = {"x_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    sizes = ("tokens", "width")
    strides: tuple[str, ...] = ("x_batch_stride", "x_token_stride")
    forward_case = AotCase(
        name=f"bias_gelu_fwd_d{width}",
        kernel=_bias_gelu_fwd_kernel,
        signature={**pointers, **dict.fromkeys((*sizes, *strides), "i32")},
        constexprs={"per_batch": None, "BLOCK_ROWS": block_rows, "BLOCK_D": block_d},
        num_warps=num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
    tile = config.backward(32768, width, 2)
    pointers = {
        "dy_ptr": "*bf16", "x_ptr": "*bf16", "bias_ptr": "*bf16", "dx_ptr": "*bf16",
        "dbias_partial_ptr": "*fp32",
    }  # fmt: skip
    strides = ("dy_batch_stride", "dy_token_stride", "x_batch_stride", "x_token_stride")
    backward_case = AotCase(
        name=f"bias_gelu_bwd_d{width}",
        kernel=_bias_gelu_bwd_kernel,
        signature={**pointers, **dict.fromkeys((*sizes, *strides, "block_tokens"), "i32")},
        constexprs={
            "per_batch": None,
            "BLOCK_ROWS": tile.block_rows,
            "BLOCK_D": tile.block_d,
            "STAGES": tile.num_stages,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        memory_bound=True,
        divisible=(*pointers, "width", *strides),
    )
    return [forward_case, backward_case]
