"""CogVideoX: LayerNorm of every head, then an interleaved rotation of the video's tokens.

The order of calls is that of ``CogVideoXAttnProcessor2_0.__call__`` in diffusers 0.42.1
(Apache-2.0, The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from ...ops.qk_norm_rope import qk_norm_rope
from ._joint import rope_of, same_dtype, why_norms_left


class FusedCogVideoXAttnProcessor(CogVideoXAttnProcessor2_0):
    """Text before video, one projection for both. An attention mask runs upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        width = 0 if attn.norm_q is None else attn.norm_q.weight.shape[0]
        rope = rope_of(image_rotary_emb, hidden_states, video, width, before=text)
        if (
            (image_rotary_emb is not None and rope is None)
            or attention_mask is not None
            or attn.is_cross_attention
            or why_left(attn) is not None
            or not same_dtype(hidden_states, attn.norm_q.weight)
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            p(x).unflatten(-1, (-1, width)) for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = qk_norm_rope(
            query, key, attn.norm_q.weight, attn.norm_k.weight, rope,
            q_bias=attn.norm_q.bias, k_bias=attn.norm_k.bias, norm="layer", eps=attn.norm_q.eps,
            law=self.sora_law,
        )  # fmt: skip
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
        )
        out = out.transpose(1, 2).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        y_text, y = out.split([text, video], dim=1)
        return y, y_text


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    if attn.fused_projections:
        return "fused projections"
    return why_norms_left(attn, nn.LayerNorm, "norm_q", "norm_k")
