"""What the processors of joint models share: readable norms, tables, rows of two streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...packing import Rope
from .._sites import FLOATS, readable, remembered_rope


def why_norms_left(attn: Any, kind: type, *names: str) -> str | None:
    """Why the q/k norms of these names keep upstream's code, or None.

    All must be of the class ``kind`` over the components of a head, with one eps.
    """
    for name in names:
        norm = getattr(attn, name)
        if not readable(norm, kind) or norm.weight is None or norm.weight.ndim != 1:
            return f"{name} is not a plain {kind.__name__} with a weight"
        if getattr(norm, "bias", None) is not None and kind is not nn.LayerNorm:
            return f"{name} has a bias"
        if norm.eps is None or norm.eps != getattr(attn, names[0]).eps:
            return f"{names[0]} and {name} differ in eps"
        if norm.weight.dtype != getattr(attn, names[0]).weight.dtype:
            return f"{names[0]} and {name} differ in dtype"
    return None


def same_dtype(x: Tensor, weight: Tensor) -> bool:
    """True if projections of ``x`` have the dtype of the norm's weight: else upstream promotes."""
    plain = not torch.is_autocast_enabled(x.device.type)
    return plain and x.dtype in FLOATS and x.dtype == weight.dtype


def rope_of(
    tables: Any, x: Tensor, tokens: int, width: int, *, before: int = 0, after: int = 0
) -> Rope | None:
    """Upstream's ``(cos, sin)``, each ``[tokens, width]`` with every angle twice; None if not.

    ``before`` or ``after`` the tokens of the tables there are so many that are not turned.
    """
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        return None
    cos, sin = tables
    if cos.shape != (tokens, width) or sin.shape != cos.shape or cos.device != x.device:
        return None
    return remembered_rope(cos, sin, after - before, _rope)


def _rope(cos: Tensor, sin: Tensor, after: int) -> Rope:
    rope = Rope.from_tables(cos[:, 0::2], sin[:, 0::2])
    return rope.padded(max(-after, 0), max(after, 0)) if after else rope


def rows_of(lengths: Sequence[int], batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Rows of streams that follow each other within each sample, int64."""
    rows = torch.arange(batch * sum(lengths), device=device).view(batch, -1)
    return tuple(part.flatten() for part in rows.split(list(lengths), dim=1))
