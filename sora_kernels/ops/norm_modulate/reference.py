"""The definition of norm_modulate in plain PyTorch: the oracle. Shares no code with the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...laws import Point
from ...rows import RowMap
from .._rounding import round_if


def norm_modulate_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    *,
    rows: RowMap,
    rms: bool,
    eps: float,
    law: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """``(1 + scale[row]) * (xhat * weight + bias) + shift[row]`` for ``x`` ``[..., D]``.

    Modulations are ``[R, D]``, vectors ``[D]``. Computes in fp32, or in fp64 if ``x`` is fp64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)

    if rms:
        xhat = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    else:
        centred = v - v.mean(-1, keepdim=True)
        xhat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xhat = round_if(law, Point.XHAT, xhat, out_dtype)

    normed = xhat
    if weight is not None:
        normed = normed * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    normed = round_if(law, Point.AFFINE, normed, out_dtype)

    def per_token(modulation: Tensor, table: Tensor | None) -> Tensor:
        modulation = modulation.to(wide)
        if table is not None:
            modulation = round_if(law, Point.TABLE, modulation + table.to(wide), out_dtype)
        return rows.expand(modulation).reshape(x.shape)

    def modulate(s: Tensor | None, c: Tensor | None) -> Tensor:
        y = normed
        if c is not None:
            one_plus = round_if(law, Point.ONE_PLUS, 1 + per_token(c, scale_table), out_dtype)
            y = round_if(law, Point.PRODUCT, y * one_plus, out_dtype)
        if s is not None:
            y = y + per_token(s, shift_table)
        return y.to(out_dtype)  # the rounding of the sum

    two = shift2 is not None or scale2 is not None
    return modulate(shift, scale), modulate(shift2, scale2) if two else None
