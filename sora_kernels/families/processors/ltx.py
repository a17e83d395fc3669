"""LTX-Video: RMSNorm across heads, rotation of the inner dimension before it is split into heads.

The order of calls is that of ``LTXVideoAttnProcessor.__call__`` in diffusers 0.42.1 (Apache-2.0,
The Lightricks team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from torch import Tensor, nn

from ...ops.qk_norm_rope import qk_norm_rope
from ...packing import Rope
from .._sites import FLOATS, readable, remembered_rope


class FusedLTXVideoAttnProcessor(LTXVideoAttnProcessor):
    """Cross-attention and masks run upstream's code."""

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
            or attention_mask is not None
            or hidden_states.ndim != 3
            or image_rotary_emb[0].element_size() < 4
            or why_left(attn) is not None
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        if query.shape[-1] != attn.norm_q.weight.shape[0] or query.dtype not in FLOATS:
            return super().__call__(attn, hidden_states, None, None, image_rotary_emb)
        value = attn.to_v(hidden_states)
        heads = (attn.heads, -1)
        q, k, v = (t.unflatten(2, heads) for t in (query, key, value))
        cos, sin = image_rotary_emb
        rope = remembered_rope(cos, sin, attn.heads, _rope)
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, rope,
            norm="rms_full", eps=attn.norm_q.eps, law=self.sora_law,
        )  # fmt: skip
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out))


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    for name in ("norm_q", "norm_k"):
        norm = getattr(attn, name)
        if not readable(norm, nn.RMSNorm) or norm.weight is None:
            return f"{name} is not a plain RMSNorm"
    if attn.norm_q.eps is None or attn.norm_q.eps != attn.norm_k.eps:
        return "norm_q and norm_k differ in eps"
    if attn.inner_dim != attn.inner_kv_dim:
        return "keys have fewer heads than queries"
    if attn.head_dim % 2:
        return "heads of an odd width"
    return None


def _rope(cos: Tensor, sin: Tensor, heads: int) -> Rope:
    """Upstream's tables ``[B, L, heads * D]`` hold every angle twice; every head has its own."""
    cos, sin = (t[..., 0::2].unflatten(2, (heads, -1)) for t in (cos, sin))
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return Rope.from_tables(cos, sin, per_head=True)
