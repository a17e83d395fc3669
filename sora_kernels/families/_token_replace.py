"""HunyuanVideo from an image: the tokens of the first frame have a modulation of their own.

Each sample has two rows of modulation, one for a prefix of its tokens and one for the others. The
formulas are those of ``transformer_hunyuan_video.py`` in diffusers 0.42.1 (Apache-2.0, The Hunyuan
Team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTokenReplaceAdaLayerNormZero,
    HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
)
from torch import Tensor

from ..rows import RowMap
from ._adaln import modulated, why_left

_CHUNKS: dict[type, int] = {HunyuanVideoTokenReplaceAdaLayerNormZero: 6,
                            HunyuanVideoTokenReplaceAdaLayerNormZeroSingle: 3}  # fmt: skip


def prefix_rows(x: Tensor, prefix: int) -> RowMap:
    """Of ``x`` ``[B, L, D]``: sample b has row 2b for its first tokens and 2b + 1 for the rest.

    Built without a look at any value, so that nothing waits for the device.
    """
    batch, length, _ = x.shape
    rest = torch.arange(length, device=x.device) >= prefix
    index = rest + 2 * torch.arange(batch, device=x.device)[:, None]
    return RowMap.from_index(index.flatten(), 2 * batch, contiguous=True)


def zero_replaced(
    adaln: Any, x: Tensor, emb: Tensor, replace_emb: Tensor, prefix: int, rows: RowMap, law: int
) -> tuple[Tensor, ...]:
    """The modulated norm and the rest of the modulation, each ``[2B, D]``: what ``adaln`` returns
    as separate tensors for the prefix and for the other tokens."""
    if why_left(adaln, *_CHUNKS) is not None:
        h, *rest = adaln(x, emb, replace_emb, prefix)
        half = len(rest) // 2
        return h, *(_pair(r, o) for o, r in zip(rest[:half], rest[half:], strict=True))
    others = adaln.linear(adaln.silu(emb))
    replaced = adaln.linear(adaln.silu(replace_emb))
    shift, scale, *rest = _pair(replaced, others).chunk(_CHUNKS[type(adaln)], dim=1)
    return modulated(adaln.norm, x, shift, scale, law, rows), *rest


def _pair(replaced: Tensor, others: Tensor) -> Tensor:
    """Rows in the order of `prefix_rows`."""
    return torch.stack([replaced, others], dim=1).flatten(0, 1)
