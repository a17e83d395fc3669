"""The definition of norm_silu in plain PyTorch: the oracle. Shares no code with the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_silu_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
) -> Tensor:
    """``silu(xhat * weight + bias)`` of ``x`` ``[B, C, ...]``, channel vectors ``[C]``.

    Computes in fp32, or in fp64 if ``x`` is fp64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    channels = x.shape[1]
    if norm == "rms":
        xhat = v * torch.rsqrt(v.square().mean(1, keepdim=True) + eps)
    elif norm == "l2":
        xhat = F.normalize(v, dim=1, eps=eps) * channels**0.5
    else:
        grouped = v.unflatten(1, (groups, channels // groups))
        dims = [d for d in range(2, grouped.dim()) if not (per_frame and d == 3)]
        centred = grouped - grouped.mean(dims, keepdim=True)
        xhat = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
        xhat = xhat.flatten(1, 2)

    per_channel = (channels,) + (1,) * (x.dim() - 2)
    if weight is not None:
        xhat = xhat * weight.to(wide).view(per_channel)
    if bias is not None:
        xhat = xhat + bias.to(wide).view(per_channel)
    return (F.silu(xhat) if silu else xhat).to(x.dtype)
