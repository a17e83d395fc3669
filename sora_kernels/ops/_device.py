"""Triton device functions of the modulated ops: loads, modulations, e^x and what is made of it
(sigmoid, tanh), the points of a law."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..backend import interpreting
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
_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def exp(v):
    """e^v, two instructions; results below 2^-126 become 0.

    `tl.exp` keeps those, at five instructions. The interpreter has no libdevice.
    """
    if _INTERPRETED:
        result = tl.exp(v)
    else:
        result = libdevice.fast_expf(v)
    return result


@triton.jit
def divide(a, b):
    """a / b to 2 ulp, two instructions, for 2^-126 <= abs(b); 0 where abs(b) > 2^126.

    `/` scales such divisors first, at seven instructions.
    """
    if _INTERPRETED:
        result = a / b
    else:
        result = libdevice.fast_dividef(a, b)
    return result


@triton.jit
def sigmoid(v):
    return divide(1.0, 1.0 + exp(-v))


@triton.jit
def load_f32(pointers, mask):
    """Loads, widened at once (the interpreter cannot compute in bf16); zero outside the mask."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def row_sums(a, b, TWO: tl.constexpr):
    """The sums of a and (TWO, else 0) of b over a row, in one reduction: every reduction of a
    program costs three barriers. The interpreter is quick with `tl.sum` only."""
    if not TWO:
        first, second = tl.sum(a, axis=0), -0.0
    elif _INTERPRETED:
        first, second = tl.sum(a, axis=0), tl.sum(b, axis=0)
    else:
        first, second = tl.reduce((a, b), 0, _add_pairs)
    return first, second


@triton.jit
def load_vectors(weight_ptr, bias_ptr, cols, mask):
    """weight and bias ``[D]``, widened; 1 and -0 (which change no number) where one is absent."""
    weight = 1.0
    bias = -0.0
    if weight_ptr is not None:
        weight = load_f32(weight_ptr + cols, mask)
    if bias_ptr is not None:
        bias = load_f32(bias_ptr + cols, mask)
    return weight, bias


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
    1 - 2 e^-2|v| / (1 + e^-2|v|).
    """
    z = v * v
    p = 0.020483316 - 0.0055286332 * z
    p = -0.053692968 + p * z
    p = 0.133309 + p * z
    p = -0.33333263 + p * z
    a = tl.abs(v)
    e = exp(-2.0 * a)
    far = 1.0 - divide(2.0 * e, 1.0 + e)
    large = tl.where(v < 0.0, -far, far)
    return tl.where(a < 0.65, v + v * z * p, large)


@triton.jit
def tanh_slope(v):
    """tanh'(v) = 4 e^-2|v| / (1 + e^-2|v|)^2: 1 - tanh^2 would cancel where tanh is near 1."""
    e = exp(-2.0 * tl.abs(v))
    return divide(4.0 * e, (1.0 + e) * (1.0 + e))
