"""Mochi: RMSNorm per head, weights of their own for text, rotation of the video with angles that
differ per head.

The order of calls is that of ``MochiAttnProcessor2_0.__call__`` in diffusers 0.42.1 (Apache-2.0,
The HuggingFace Team), with its attention of one sample after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.normalization import MochiRMSNorm
from torch import Tensor
from torch.nn import functional

from ...ops.qk_norm_rope import qk_norm_rope
from ...packing import Rope
from .._sites import FLOATS, readable, remembered_rope

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class FusedMochiAttnProcessor(MochiAttnProcessor2_0):
    """Norms and rotation of q and k of both streams; learning the angles runs upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> Any:
        if (
            why_left(attn) is not None
            or hidden_states.dtype not in FLOATS
            or hidden_states.ndim != 3
            or not _is_constant(image_rotary_emb)
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        heads = (attn.heads, -1)
        query, key, value = (
            linear(hidden_states).unflatten(2, heads)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        rope = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            rope = remembered_rope(cos, sin, attn.heads, _rope)
        law = self.sora_law
        query, key = qk_norm_rope(
            query, key, attn.norm_q.weight, attn.norm_k.weight, rope, eps=attn.norm_q.eps, law=law
        )
        text_query, text_key, text_value = (
            linear(encoder_hidden_states).unflatten(2, heads)
            for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        text_query, text_key = qk_norm_rope(
            text_query, text_key, attn.norm_added_q.weight, attn.norm_added_k.weight,
            eps=attn.norm_added_q.eps, law=law,
        )  # fmt: skip

        video = [t.transpose(1, 2) for t in (query, key, value)]
        text = [t.transpose(1, 2) for t in (text_query, text_key, text_value)]
        length, text_length = query.shape[1], text_query.shape[1]
        outputs = []
        for i in range(query.shape[0]):
            valid = torch.nonzero(attention_mask[i].flatten(), as_tuple=False).flatten()
            q, k, v = (
                torch.cat((a[i : i + 1], b[i : i + 1, :, valid]), dim=2)
                for a, b in zip(video, text, strict=True)
            )
            out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
            outputs.append(functional.pad(out, (0, 0, 0, length + text_length - out.shape[2])))
        joint = torch.cat(outputs).transpose(1, 2).flatten(2, 3)
        out, text_out = joint.split_with_sizes((length, text_length), dim=1)
        out = attn.to_out[1](attn.to_out[0](out))
        if hasattr(attn, "to_add_out"):
            text_out = attn.to_add_out(text_out)
        return out, text_out


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    for name in _NORMS:
        norm = getattr(attn, name)
        if not readable(norm, MochiRMSNorm) or norm.weight is None:
            return f"{name} is not a plain MochiRMSNorm"
    if len({getattr(attn, name).eps for name in _NORMS}) != 1:
        return "the norms of q and k differ in eps"
    return None


def _rope(cos: Tensor, sin: Tensor, heads: int) -> Rope:
    """Upstream's tables ``[L, heads, D / 2]``."""
    return Rope.from_tables(cos, sin, per_head=True)


def _is_constant(rotary: tuple[Tensor, Tensor] | None) -> bool:
    """The angles are a parameter of the model: the op has no gradient for them."""
    return rotary is None or (rotary[0].element_size() >= 4 and not rotary[0].requires_grad)
