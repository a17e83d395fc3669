"""Cross-attention to the text tokens that a mask leaves, packed.

Models pad their prompts to one length and add about -10000 to the scores of the padding. Those keys
count nothing, so only the others are projected and attended to, each sample in a segment of its
own: the same sums without their zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...ops.packed_attention import packed_attention
from .._sites import FLOATS, readable_mask, remembered

# Measured on a CPU: packed, these are faster, forward and backward; of more keys a padded batch is.
MOST = 0.5
NEGLIGIBLE = -9000.0


@dataclass(frozen=True)
class Keys:
    """The tokens that a mask leaves.

    Attributes:
        rows: in the flattened text, int64 ``[Nk]``.
        cu_seqlens: where those of each sample begin, int32 ``[B + 1]``.
        longest: the most of any sample.
    """

    rows: Tensor
    cu_seqlens: Tensor
    longest: int


def packed_keys(mask: Any, x: Tensor, text: Any) -> Keys | None:
    """The keys in ``text`` ``[B, L, C]`` that ``mask`` ``[B, 1, L]`` leaves to queries from ``x``.

    Reads the mask once for all blocks of a step, as the model hands the same one to each. None if
    upstream's attention should run: another kind of mask, a sample without a key, more than `MOST`
    of the keys, and where nothing can be read (compiled code, captured graphs).
    """
    if (
        not readable_mask(mask)
        or type(text) is not Tensor
        or x.ndim != 3
        or text.ndim != 3
        or mask.shape != (x.shape[0], 1, text.shape[1])
        or text.shape[0] != x.shape[0]
        or x.dtype not in FLOATS
        or text.dtype is not x.dtype
    ):
        return None
    return _keys(mask)


@remembered
def _keys(mask: Tensor) -> Keys | None:
    left = mask[:, 0] == 0
    counts = left.sum(1)
    known = (left | (mask[:, 0] <= NEGLIGIBLE)).all()
    *lengths, clean = torch.cat([counts, known[None]]).tolist()
    if not clean or min(lengths) == 0 or sum(lengths) > MOST * left.numel():
        return None
    rows = left.flatten().nonzero()[:, 0]
    return Keys(rows, functional.pad(counts.cumsum(0), (1, 0)).int(), max(lengths))


def cross_attention(attn: Any, x: Tensor, text: Tensor, keys: Keys, norms: bool = False) -> Tensor:
    """What ``attn`` computes of ``x`` ``[B, L, C]`` and the kept tokens of ``text``.

    With ``norms`` its norms of q and k, which span the heads.
    """
    text = text.flatten(0, 1).index_select(0, keys.rows)[None]
    q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)
    if norms:
        q, k = attn.norm_q(q), attn.norm_k(k)
    batch, length, _ = q.shape
    cu_seqlens = torch.arange(
        0, (batch + 1) * length, length, dtype=torch.int32, device=keys.cu_seqlens.device
    )
    heads = (attn.heads, -1)
    out = packed_attention(
        *(t.flatten(0, 1).unflatten(1, heads) for t in (q, k, v)),
        cu_seqlens=cu_seqlens, max_seqlen=length,
        cu_seqlens_k=keys.cu_seqlens, max_seqlen_k=keys.longest,
    )  # fmt: skip
    out = out.flatten(1).view(batch, length, -1)
    return cast(Tensor, attn.to_out[1](attn.to_out[0](out)))
