"""Mochi: RMSNorm per head, video and text by weights of their own, angles that differ per head.

The order of calls is that of ``MochiAttnProcessor2_0.__call__`` in diffusers 0.42.1 (Apache-2.0,
The HuggingFace Team). Upstream joins each sample's video with its valid text tokens by copies of q,
k and v, one sample after the other, and pads every result. Here the op writes each token to its
place at once: video, valid text, the rest; attention reads the front of that.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.normalization import MochiRMSNorm
from torch import Tensor
from torch.nn import functional

from ...ops.qk_norm_rope import qk_norm_rope_joint
from ...packing import Rope
from .._sites import FLOATS, remembered, remembered_rope
from ._joint import why_norms_left


class FusedMochiAttnProcessor(MochiAttnProcessor2_0):
    """Both streams; learning the angles runs upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if (
            why_left(attn) is not None
            or x.dtype not in FLOATS
            or x.ndim != 3
            or text.dtype is not x.dtype
            or mask.shape != text.shape[:2]
            or not _is_constant(image_rotary_emb)
        ):
            return super().__call__(attn, x, text, mask, image_rotary_emb)
        linears = (
            (x, (attn.to_q, attn.to_k, attn.to_v)),
            (text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
        )
        heads, length, text_length = (attn.heads, -1), x.shape[1], text.shape[1]
        rope = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            rope = remembered_rope(cos, sin, text_length, _rope)
        rows, valid = _rows(mask, length)
        joint = qk_norm_rope_joint(
            [[p(stream).unflatten(2, heads) for p in three] for stream, three in linears],
            [attn.norm_q.weight, attn.norm_added_q.weight],
            [attn.norm_k.weight, attn.norm_added_k.weight],
            rope, index=rows, eps=attn.norm_q.eps, law=self.sora_law,
        )  # fmt: skip
        # One call if all prompts are equally long, else one for each sample, as upstream
        alike = len(set(valid)) == 1
        groups = [slice(None)] if alike else [slice(i, i + 1) for i in range(len(valid))]
        videos, texts = [], []
        for group, count in zip(groups, valid, strict=not alike):
            q, k, v = (t[group, : length + count].transpose(1, 2) for t in joint)
            out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
            out = out.transpose(1, 2).flatten(2, 3)
            videos.append(out[:, :length])
            texts.append(functional.pad(out[:, length:], (0, 0, 0, text_length - count)))
        y, y_text = (t[0] if alike else torch.cat(t) for t in (videos, texts))
        y = attn.to_out[1](attn.to_out[0](y))
        if hasattr(attn, "to_add_out"):
            y_text = attn.to_add_out(y_text)
        return y, y_text


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    return why_norms_left(attn, MochiRMSNorm, "norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _is_constant(rotary: Any) -> bool:
    """The angles are a parameter of the model: the op has no gradient for them."""
    return rotary is None or (rotary[0].element_size() >= 4 and not rotary[0].requires_grad)


def _rope(cos: Tensor, sin: Tensor, text_length: int) -> Rope:
    """Upstream's tables ``[L, heads, D / 2]``, then text, which is not turned."""
    return Rope.from_tables(cos, sin, per_head=True).padded(after=text_length)


Rows = tuple[tuple[Tensor, Tensor], list[int]]


@remembered
def _rows(mask: Tensor, length: int) -> Rows:
    """Where video and text tokens go, int64, and how many text tokens of each sample are valid.

    A sample has ``length`` video tokens, then its valid text tokens in their order, then the rest.
    """
    valid = mask != 0
    counts = valid.sum(1, keepdim=True)
    rank = torch.where(valid, valid.cumsum(1), counts + (~valid).cumsum(1)) - 1
    start = torch.arange(len(mask), device=mask.device)[:, None] * (length + mask.shape[1])
    video = start + torch.arange(length, device=mask.device)
    text = start + length + rank
    return (video.flatten(), text.flatten()), counts.flatten().tolist()
