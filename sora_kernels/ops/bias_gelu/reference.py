"""The definition of bias_gelu in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)``, tanh form, computed in fp32 (fp64 for fp64), rounded once."""
    compute = torch.promote_types(x.dtype, torch.float32)
    u = x.to(compute)
    if bias is not None:
        u = u + bias.to(compute)
    return F.gelu(u, approximate="tanh").to(x.dtype)
