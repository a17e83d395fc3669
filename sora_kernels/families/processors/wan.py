"""Wan: RMSNorm across heads and interleaved rotation of the self-attention's q and k.

The order of calls is that of ``WanAttnProcessor.__call__`` in diffusers 0.42.1 (Apache-2.0, The Wan
Team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from ...laws import Point
from ...ops.qk_norm_rope import qk_norm_rope
from ...packing import Rope
from .._sites import FLOATS, readable, remembered_rope


class FusedWanAttnProcessor(WanAttnProcessor):
    """Cross-attention, image keys and fused projections run upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if (
            rotary_emb is None
            or encoder_hidden_states is not None
            or attn.add_k_proj is not None
            or attn.fused_projections
            or why_left(attn) is not None
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        if query.shape[-1] != attn.norm_q.weight.shape[0] or query.dtype not in FLOATS:
            return super().__call__(attn, hidden_states, None, attention_mask, rotary_emb)
        value = attn.to_v(hidden_states)
        cos, sin = rotary_emb
        heads = (-1, cos.shape[-1])
        q, k, v = (t.unflatten(2, heads) for t in (query, key, value))
        law = self.sora_law
        if cos.dtype is query.dtype and query.element_size() < 4:
            law |= Point.ROPE  # the whole model was cast: upstream rotates in that dtype
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, remembered_rope(cos, sin, 0, _rope),
            norm="rms_full", eps=attn.norm_q.eps, law=law,
        )  # fmt: skip
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    if attn.fused_projections:
        return "fused projections"
    for name in ("norm_q", "norm_k"):
        norm = getattr(attn, name)
        if not readable(norm, nn.RMSNorm) or norm.weight is None:
            return f"{name} is not a plain RMSNorm"
    if attn.norm_q.eps is None or attn.norm_q.eps != attn.norm_k.eps:
        return "norm_q and norm_k differ in eps"
    return None


def _rope(cos: Tensor, sin: Tensor, heads: int) -> Rope:
    """Upstream's tables ``[1 or B, L, 1, D]`` hold every angle twice."""
    cos, sin = cos[:, :, 0, 0::2], sin[:, :, 0, 1::2]
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return Rope.from_tables(cos, sin)
