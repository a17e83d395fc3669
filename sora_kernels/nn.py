"""``torch.nn``'s norms, which also take a modulation: ``from sora_kernels import nn as skn``.

Subclasses with the same constructor and the same ``state_dict``, so a checkpoint fits either way.
Called with ``x`` alone they give what their parents give; with ``shift`` and ``scale`` the adaLN of
DiT in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .laws import Law
from .ops.norm_modulate import norm_modulate
from .rows import RowMap

__all__ = ["LayerNorm", "RMSNorm"]


def _forward(
    module: Any, norm: str, eps: float, x: Tensor, shift: Tensor | None, scale: Tensor | None,
    rows: RowMap | None, per: str | None, law: Law,
) -> Tensor:  # fmt: skip
    if len(module.normalized_shape) != 1:
        raise ValueError(
            f"normalized_shape: expected one dimension, got {tuple(module.normalized_shape)}"
        )
    y = norm_modulate(
        x, shift, scale, weight=module.weight, bias=getattr(module, "bias", None), norm=norm,
        eps=eps, rows=rows, per=per, law=law,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y


class LayerNorm(nn.LayerNorm):
    """``(1 + scale) * LayerNorm(x) + shift``."""

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        rows: RowMap | None = None,
        per: str | None = None,
        law: Law = "fp32_once",
    ) -> Tensor:
        """The arguments of :func:`sora_kernels.norm_modulate`; ``[N, D]`` or ``[B, ..., D]``."""
        return _forward(self, "layer", self.eps, x, shift, scale, rows, per, law)


class RMSNorm(nn.RMSNorm):
    """``(1 + scale) * RMSNorm(x) + shift``."""

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        rows: RowMap | None = None,
        per: str | None = None,
        law: Law = "fp32_once",
    ) -> Tensor:
        """The arguments of :func:`sora_kernels.norm_modulate`; ``[N, D]`` or ``[B, ..., D]``."""
        # The default of torch.nn.RMSNorm is the machine epsilon of the input.
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return _forward(self, "rms", eps, x, shift, scale, rows, per, law)
