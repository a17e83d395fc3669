"""The definition of guided_step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_reference(
    cond: Tensor, uncond: Tensor | None, guidance: Tensor, compute: torch.dtype
) -> Tensor:
    """``uncond + guidance * (cond - uncond)``; ``guidance`` ``[N, 1]``, a number per token."""
    v = cond.to(compute)
    if uncond is None:
        return v
    free = uncond.to(compute)
    return free + guidance.to(compute) * (v - free)


def guided_step_reference(
    x: Tensor, cond: Tensor, uncond: Tensor | None, guidance: Tensor, weight: Tensor, rows: Tensor
) -> Tensor:
    """All of ``[N, D]``; ``guidance`` and ``weight`` ``[R]``, ``rows`` the row of each token."""
    compute = torch.promote_types(x.dtype, torch.float32)
    v = velocity_reference(cond, uncond, guidance[rows, None], compute)
    return (x.to(compute) + weight.to(compute)[rows, None] * v).to(x.dtype)
