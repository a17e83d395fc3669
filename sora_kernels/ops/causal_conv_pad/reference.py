"""The definition of causal_conv_pad in plain PyTorch: the oracle. Shares no code with kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_pad_reference(
    x: Tensor,
    cache: Tensor | None,
    pad_t: int,
    pad_h: tuple[int, int],
    pad_w: tuple[int, int],
    replicate: bool,
    keep: int,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """``F.pad(torch.cat([fill, cache, x], 2), ...)``, the last ``keep`` frames unpadded."""
    whole = x if cache is None else torch.cat([cache, x], 2)
    missing = pad_t - (0 if cache is None else cache.shape[2])
    if missing:
        first = whole[:, :, :1].expand(-1, -1, missing, -1, -1)
        whole = torch.cat([first if replicate else torch.zeros_like(first), whole], 2)
    kept = whole[:, :, whole.shape[2] - keep :]
    padded = F.pad(whole, (*pad_w, *pad_h)) if any(pad_w + pad_h) else whole

    def own(tensor: Tensor) -> Tensor:  # never a view of x
        return tensor.clone(memory_format=memory_format)

    return own(padded) if padded is x else padded.contiguous(memory_format=memory_format), own(kept)
