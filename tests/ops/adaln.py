"""What the conventions of adaLN share: sizes, the norms of the model codes, and what a case is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """B samples of T frames of P tokens, D wide."""

    b: int
    t: int
    p: int
    d: int

    @property
    def tokens(self) -> int:
        return self.t * self.p


Shapes = Callable[[Size], dict[str, tuple[int, ...]]]
Formula = Callable[[SimpleNamespace], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Convention:
    """``shapes`` of the inputs, the model's ``formula`` and ``ours``, its rounding ``law``.

    Inputs named in ``fp32`` stay fp32 when the model runs in bf16.
    """

    shapes: Shapes
    formula: Formula
    ours: Callable[..., tuple[Tensor, ...]]
    law: str | Iterable[str] = "torch"
    fp32: tuple[str, ...] = field(default=())


def wide(x: Tensor) -> Tensor:
    """``x.float()`` of the model codes; fp64 stays itself, it is the oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
          eps: float = 1e-6) -> Tensor:  # fmt: skip
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def diffusers_rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm of diffusers: back to the model's dtype before the weight."""
    xhat = (wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return xhat if weight is None else xhat * weight


def stream(z: Size) -> tuple[int, ...]:
    return (z.b, z.tokens, z.d)


def one(x: Any) -> Tensor:
    assert isinstance(x, Tensor)
    return x
