"""Rounding in references: the value is rounded, the gradient passes straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_if(law: int, point: int, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` rounded to ``dtype`` and back if ``law`` has ``point``."""
    if not law & point or value.dtype == dtype:
        return value
    if torch.is_grad_enabled() and value.requires_grad:
        return _Round.apply(value, dtype)
    return value.to(dtype).to(value.dtype)
