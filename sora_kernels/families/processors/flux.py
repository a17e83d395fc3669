"""Flux: RMSNorm per head, text and image by weights of their own, and an interleaved rotation.

The order of calls is that of ``FluxAttnProcessor.__call__`` in diffusers 0.42.1 (Apache-2.0, Black
Forest Labs and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ...ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_joint
from ._joint import rope_of, rows_of, same_dtype, why_norms_left


class FusedFluxAttnProcessor(FluxAttnProcessor):
    """Two streams (text before image) or one. Fused projections run upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x: Tensor = hidden_states
        text: Any = encoder_hidden_states
        length = 0 if text is None else text.shape[1]
        rope = rope_of(image_rotary_emb, x, length + x.shape[1], attn.head_dim)
        if (
            (image_rotary_emb is not None and rope is None)
            or (text is None) != (attn.added_kv_proj_dim is None)
            or why_left(attn) is not None
            or not same_dtype(x, attn.norm_q.weight)
        ):
            return super().__call__(attn, x, text, attention_mask, image_rotary_emb)
        heads = (-1, attn.head_dim)
        query, key, value = (p(x).unflatten(-1, heads) for p in (attn.to_q, attn.to_k, attn.to_v))
        options: Any = {"rope": rope, "eps": attn.norm_q.eps, "law": self.sora_law}
        if text is None:
            query, key = qk_norm_rope(query, key, attn.norm_q.weight, attn.norm_k.weight, **options)
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query, key, value = qk_norm_rope_joint(
                [[p(text).unflatten(-1, heads) for p in added], [query, key, value]],
                [attn.norm_added_q.weight, attn.norm_q.weight],
                [attn.norm_added_k.weight, attn.norm_k.weight],
                index=rows_of([length, x.shape[1]], len(x), x.device),
                **options,
            )
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(query.dtype)
        if text is None:
            return out
        y_text, y = out.split_with_sizes([length, out.shape[1] - length], dim=1)
        y = attn.to_out[1](attn.to_out[0](y.contiguous()))
        return y, attn.to_add_out(y_text.contiguous())


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    if attn.fused_projections:
        return "fused projections"
    names = ["norm_q", "norm_k"]
    if attn.added_kv_proj_dim is not None:
        names += ["norm_added_q", "norm_added_k"]
    return why_norms_left(attn, nn.RMSNorm, *names)
