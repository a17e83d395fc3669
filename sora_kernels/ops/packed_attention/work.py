"""Work lists: which block of which segment each program of a kernel takes, longest first."""

from __future__ import annotations

import torch
from torch import Tensor


def work_list(
    cu_seqlens: Tensor, num_tokens: int, block: int, cost: Tensor | None = None
) -> Tensor:
    """int32 `[num_tokens // block + S, 2]` of (segment, block), built on the device.

    Vectorised and without a sync: the number of rows is a bound, spare rows hold segment -1.
    Segments come in order of falling `cost` (the rows each of their blocks has to read,
    `[S]`; default: their own length), so that the longest programs start first.
    """
    lengths = cu_seqlens.diff()
    bound = num_tokens // block + lengths.shape[0]
    if lengths.shape[0] == 0:
        return cu_seqlens.new_empty((bound, 2))
    order = torch.argsort(lengths if cost is None else cost, descending=True, stable=True)
    counts = ((lengths + (block - 1)) // block)[order]
    ends = counts.cumsum(0)
    w = torch.arange(bound, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, w, right=True).clamp(max=lengths.shape[0] - 1)
    segment = torch.where(w < ends[-1], order[rank], -1)
    number = w - (ends - counts)[rank]
    return torch.stack((segment, number), 1).to(torch.int32)
