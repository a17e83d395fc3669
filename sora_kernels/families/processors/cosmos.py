"""Cosmos: RMSNorm per head and a rotation of the halves of the whole head.

The order of calls is that of ``CosmosAttnProcessor2_0.__call__`` in diffusers 0.42.1 (Apache-2.0,
The NVIDIA Team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import Tensor

from ...ops.qk_norm_rope import qk_norm_rope
from ...packing import Rope
from .._sites import FLOATS, readable, remembered_rope


class FusedCosmosAttnProcessor(CosmosAttnProcessor2_0):
    """Self-attention with heads alike; anything else runs upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if (
            image_rotary_emb is None
            or encoder_hidden_states is not None
            or why_left(attn) is not None
            or image_rotary_emb[0].element_size() < 4
            or hidden_states.dtype not in FLOATS
            or not _alike(attn, hidden_states)
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        heads = (attn.heads, -1)
        q, k, v = (
            linear(hidden_states).unflatten(2, heads)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        # Under autocast the norms' weights are wider: q and k are rounded when attention takes them
        law = self.sora_law if attn.norm_q.weight.dtype is q.dtype else 0
        cos, sin = (t.to(q.device) for t in image_rotary_emb)
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight,
            remembered_rope(cos, sin, attn.heads, _rope),
            eps=attn.norm_q.eps, pairing="half", law=law,
        )  # fmt: skip
        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    for name in ("norm_q", "norm_k"):
        norm = getattr(attn, name)
        if not readable(norm, RMSNorm) or norm.weight is None or norm.bias is not None:
            return f"{name} is not a plain RMSNorm with a weight"
    if attn.inner_dim != attn.inner_kv_dim:
        return "keys have fewer heads than queries"
    if attn.norm_q.eps != attn.norm_k.eps:
        return "norm_q and norm_k differ in eps"
    return None


def _alike(attn: Any, x: Tensor) -> bool:
    """With weights wider than the stream q and k stay wide, for which only autocast has a use."""
    dtypes = {attn.norm_q.weight.dtype, attn.norm_k.weight.dtype}
    return dtypes == {x.dtype} or (
        dtypes == {torch.float32} and torch.is_autocast_enabled(x.device.type)
    )


def _rope(cos: Tensor, sin: Tensor, heads: int) -> Rope:
    """Upstream's tables ``[L, D]`` hold every angle twice, half after half."""
    half = cos.shape[-1] // 2
    return Rope.from_tables(cos[:, :half], sin[:, :half])
