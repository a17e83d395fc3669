"""SD3.5: RMSNorm of every head, image and text by weights of their own, no rotation.

The order of calls is that of ``JointAttnProcessor2_0.__call__`` in diffusers 0.42.1 (Apache-2.0,
The HuggingFace Team). SD3.0 has no norms of q and k and keeps upstream's processor.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from torch.nn import functional

from ...ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_joint
from .._rows import ABSENT
from ._joint import rows_of, same_dtype, why_norms_left


class FusedJointAttnProcessor(JointAttnProcessor2_0):
    """Image before text, or (the second attention of SD3.5) the image alone."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x: Any = hidden_states
        text: Any = encoder_hidden_states
        if (
            why_left(attn) is not None
            or (text is None) != (attn.added_kv_proj_dim is None)
            or not same_dtype(x, attn.norm_q.weight)
        ):
            return super().__call__(attn, x, text, attention_mask, *args, **kwargs)
        heads = (-1, attn.norm_q.weight.shape[0])
        options: Any = {"eps": attn.norm_q.eps, "law": self.sora_law}
        query, key, value = (p(x).unflatten(-1, heads) for p in (attn.to_q, attn.to_k, attn.to_v))
        if text is None:
            query, key = qk_norm_rope(query, key, attn.norm_q.weight, attn.norm_k.weight, **options)
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query, key, value = qk_norm_rope_joint(
                [[query, key, value], [p(text).unflatten(-1, heads) for p in added]],
                [attn.norm_q.weight, attn.norm_added_q.weight],
                [attn.norm_k.weight, attn.norm_added_k.weight],
                index=rows_of([x.shape[1], text.shape[1]], len(x), x.device),
                **options,
            )
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=0.0,
            is_causal=False,
        )
        out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if text is None:
            return attn.to_out[1](attn.to_out[0](out))
        y, y_text = out[:, : x.shape[1]], out[:, x.shape[1] :]
        if not attn.context_pre_only:
            y_text = attn.to_add_out(y_text)
        return attn.to_out[1](attn.to_out[0](y)), y_text


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    if attn.fused_projections:
        return "fused projections"
    names = ["norm_q", "norm_k"]
    if attn.added_kv_proj_dim is not None:
        names += ["norm_added_q", "norm_added_k"]
    if all(getattr(attn, name) is None for name in names):
        return ABSENT
    return why_norms_left(attn, RMSNorm, *names)
