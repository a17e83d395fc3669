"""The definition of gate_residual_norm_modulate in plain PyTorch: the oracle.

Shares no code with the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...laws import Point
from ...rows import RowMap
from .._rounding import round_if


def gate_residual_norm_modulate_reference(
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
    *,
    rows: RowMap,
    rms: bool,
    eps: float,
    law: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``r = x + gate[row]*y (+ gate2[row]*y2)`` and ``(1+scale)*(norm(r)*weight+bias)+shift``.

    Modulations are ``[R, D]``, vectors ``[D]``. Computes in fp32, or in fp64 if ``x`` is fp64. The
    norm reads the unrounded sum unless the law has RESIDUAL. The gated branch is rounded to the
    dtype of ``y``, the residual to that of ``x``, everything after to ``out_dtype``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def per_token(modulation: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        modulation = modulation.to(wide)
        if table is not None:
            modulation = round_if(law, Point.TABLE, modulation + table.to(wide), dtype)
        return rows.expand(modulation).reshape(x.shape)

    residual = x.to(wide)
    for branch, g, table in ((y, gate, gate_table), (y2, gate2, None)):
        if branch is not None:
            gated = branch.to(wide)
            if g is not None:
                gated = per_token(g, table, y.dtype) * gated
                gated = round_if(law, Point.GATED, gated, y.dtype)
            residual = round_if(law, Point.RESIDUAL, residual + gated, x.dtype)

    centred = residual if rms else residual - residual.mean(-1, keepdim=True)
    xhat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = round_if(law, Point.XHAT, xhat, out_dtype)
    if weight is not None:
        normed = normed * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    normed = round_if(law, Point.AFFINE, normed, out_dtype)

    if scale is not None:
        one_plus = 1 + per_token(scale, scale_table, out_dtype)
        one_plus = round_if(law, Point.ONE_PLUS, one_plus, out_dtype)
        normed = round_if(law, Point.PRODUCT, normed * one_plus, out_dtype)
    if shift is not None:
        normed = normed + per_token(shift, shift_table, out_dtype)
    return residual.to(x.dtype), normed.to(out_dtype)  # the rounding of the sum
