"""Triton device functions of the modulated ops: loads, modulations, tanh, the points of a law."""

from __future__ import annotations

import triton
import triton.language as tl

from ..laws import Point
from ._grouped import round_if

XHAT = tl.constexpr(int(Point.XHAT))
AFFINE = tl.constexpr(int(Point.AFFINE))
TABLE = tl.constexpr(int(Point.TABLE))
ONE_PLUS = tl.constexpr(int(Point.ONE_PLUS))
PRODUCT = tl.constexpr(int(Point.PRODUCT))
TANH = tl.constexpr(int(Point.TANH))
GATED = tl.constexpr(int(Point.GATED))
RESIDUAL = tl.constexpr(int(Point.RESIDUAL))


@triton.jit
def load_f32(pointers, mask):
    """Loads, widened at once (the interpreter cannot compute in bf16); zero outside the mask."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_or(vector_ptr, cols, mask, absent: tl.constexpr):
    """A vector ``[D]``, widened; the number ``absent`` if there is none."""
    value = absent
    if vector_ptr is not None:
        value = load_f32(vector_ptr + cols, mask)
    return value


@triton.jit
def load_modulation(
    matrix_ptr, table_ptr, offsets, cols, mask, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """A modulation per token plus its per-block table (adaLN-single), if there is one."""
    value = load_f32(matrix_ptr + offsets, mask)
    if table_ptr is not None:
        value = round_if(value + load_f32(table_ptr + cols, cols_mask), LAW, TABLE, dtype)
    return value


@triton.jit
def load_one_plus(
    scale_ptr, table_ptr, offsets, cols, mask, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """1 + (scale + table), rounded as the law says."""
    scale = load_modulation(scale_ptr, table_ptr, offsets, cols, mask, cols_mask, LAW, dtype)
    return round_if(1.0 + scale, LAW, ONE_PLUS, dtype)


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, cols, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr):
    """xhat * weight + bias, either of them optional; ``xhat`` is already rounded."""
    if weight_ptr is not None:
        xhat *= load_f32(weight_ptr + cols, cols_mask)
    if bias_ptr is not None:
        xhat += load_f32(bias_ptr + cols, cols_mask)
    return round_if(xhat, LAW, AFFINE, dtype)


@triton.jit
def modulate(
    normed, shift_ptr, shift_stride, scale_ptr, scale_stride, shift_table_ptr, scale_table_ptr,
    rows, cols, mask, cols_mask, LAW: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(1 + scale[row]) * normed + shift[row], either of them optional; the store rounds the sum."""
    if scale_ptr is not None:
        offsets = rows * scale_stride + cols
        normed *= load_one_plus(
            scale_ptr, scale_table_ptr, offsets, cols, mask, cols_mask, LAW, dtype
        )
        normed = round_if(normed, LAW, PRODUCT, dtype)
    if shift_ptr is not None:
        offsets = rows * shift_stride + cols
        normed += load_modulation(
            shift_ptr, shift_table_ptr, offsets, cols, mask, cols_mask, LAW, dtype
        )
    return normed


@triton.jit
def tanh(v):
    """tanh to fp32 rounding, near zero too (where zero-initialised gates begin).

    Near zero v + v^3 P(v^2) with P fitted to least relative error on [0, 0.65], else
    1 - 2 / (e^2|v| + 1).
    """
    z = v * v
    p = 0.020483316 - 0.0055286332 * z
    p = -0.053692968 + p * z
    p = 0.133309 + p * z
    p = -0.33333263 + p * z
    a = tl.abs(v)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(a < 10.0, a, 10.0)) + 1.0)
    large = tl.where(v < 0.0, -far, far)
    result = tl.where(a < 0.65, v + v * z * p, large)
    return tl.where(v == v, result, v)  # NaN stays NaN
