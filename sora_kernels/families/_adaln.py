"""adaLN-Zero of diffusers: modules that project a modulation, and the ops that apply it.

A modulation is one row per sample, ``[B, D]``, or ``[R, D]`` with ``rows``. Each function runs an
op if it may and upstream's expression otherwise. The formulas are those of ``AdaLayerNormZero`` and
its kin in ``normalization.py`` of diffusers 0.42.1 (Apache-2.0, The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn

from ..ops.gate_residual import gate_residual
from ..ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ..ops.norm_modulate import norm_modulate
from ..rows import RowMap
from ._sites import FLOATS, readable, why_unreadable

_CHUNKS: dict[type, int] = {AdaLayerNormZero: 6, AdaLayerNormZeroSingle: 3}


def fits(x: Tensor, *others: Tensor, rows: RowMap | None = None) -> bool:
    """True if the ops take the stream ``x`` ``[B, L, D]`` with these branches and modulations."""
    if x.ndim != 3 or x.dtype not in FLOATS:
        return False
    shapes = (x.shape, (rows.num_rows if rows else x.shape[0], x.shape[2]))
    return all(
        o.dtype == x.dtype and o.device == x.device and o.shape in shapes for o in others
    )  # upstream promotes other dtypes and broadcasts other shapes


def why_left(adaln: nn.Module, *classes: type) -> str | None:
    """Why the norm inside ``adaln`` keeps upstream's code, or None."""
    reason = why_unreadable(adaln, *classes)
    if reason is None and getattr(adaln, "emb", None) is not None:
        return "it embeds its condition itself"
    return reason or why_unreadable(cast(nn.Module, adaln.norm), nn.LayerNorm)


def modulated(
    norm: Any, x: Tensor, shift: Tensor, scale: Tensor, law: int, rows: RowMap | None = None
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``."""
    if fits(x, shift, scale, rows=rows) and readable(norm, nn.LayerNorm):
        y = norm_modulate(
            x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps, rows=rows, law=law
        )
        return cast(Tensor, y)
    return norm(x) * _spread(1 + scale, x, rows) + _spread(shift, x, rows)


def gated(x: Tensor, y: Tensor, gate: Tensor, law: int, rows: RowMap | None = None) -> Tensor:
    """``x + gate * y``."""
    if fits(x, y, gate, rows=rows):
        return gate_residual(x, y, gate, rows=rows, law=law)
    return x + _spread(gate, x, rows) * y


def gated_modulated(
    norm: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, law: int,
    rows: RowMap | None = None,
    second: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``r = x + gate * y`` and ``norm(r) * (1 + scale) + shift``; ``second``: y and gate of a
    branch that joins behind the first."""
    y2, gate2 = second or (None, None)
    fit = fits(x, y, gate, shift, scale, *(second or ()), rows=rows)
    if fit and readable(norm, nn.LayerNorm):
        return gate_residual_norm_modulate(
            x, y, gate, shift, scale, y2=y2, gate2=gate2,
            weight=norm.weight, bias=norm.bias, eps=norm.eps, rows=rows, law=law,
        )  # fmt: skip
    x = gated(x, y, gate, law, rows)
    if second is not None:
        x = gated(x, *second, law, rows)
    return x, modulated(norm, x, shift, scale, law, rows)


def zero(adaln: Any, x: Tensor, emb: Tensor, law: int) -> tuple[Tensor, ...]:
    """What ``adaln(x, emb=emb)`` returns: the modulated norm and the rest of the modulation."""
    if why_left(adaln, AdaLayerNormZero, AdaLayerNormZeroSingle) is not None:
        return cast(tuple[Tensor, ...], adaln(x, emb=emb))
    shift, scale, *rest = adaln.linear(adaln.silu(emb)).chunk(_CHUNKS[type(adaln)], dim=1)
    return modulated(adaln.norm, x, shift, scale, law), *rest


def zero_x(adaln: Any, x: Tensor, emb: Tensor, law: int) -> tuple[Tensor, ...]:
    """What ``adaln(x, emb=emb)`` returns for an ``SD35AdaLayerNormZeroX``: one norm, modulated
    twice; the second modulated norm and the gate of its branch come last."""
    if why_left(adaln, SD35AdaLayerNormZeroX) is None:
        chunks = adaln.linear(adaln.silu(emb)).chunk(9, dim=1)
        shift, scale, *rest, shift2, scale2, gate2 = chunks
        if fits(x, *chunks):
            h, h2 = norm_modulate(
                x, shift, scale, shift2=shift2, scale2=scale2, eps=adaln.norm.eps,
                weight=adaln.norm.weight, bias=adaln.norm.bias, law=law,
            )  # fmt: skip
        else:
            normed = adaln.norm(x)
            h = normed * (1 + scale[:, None]) + shift[:, None]
            h2 = normed * (1 + scale2[:, None]) + shift2[:, None]
        return h, *rest, h2, gate2
    return cast(tuple[Tensor, ...], adaln(x, emb=emb))


def continuous(adaln: Any, x: Tensor, emb: Tensor, law: int) -> Tensor:
    """What ``adaln(x, emb)`` returns for an ``AdaLayerNormContinuous``."""
    if why_left(adaln, AdaLayerNormContinuous) is not None:
        return cast(Tensor, adaln(x, emb))
    scale, shift = torch.chunk(adaln.linear(adaln.silu(emb).to(x.dtype)), 2, dim=1)
    return modulated(adaln.norm, x, shift, scale, law)


def _spread(mod: Tensor, x: Tensor, rows: RowMap | None) -> Tensor:
    """A modulation in a shape that broadcasts over the tokens of ``x``."""
    return mod[:, None] if rows is None else rows.expand(mod).view(*x.shape[:2], -1)
