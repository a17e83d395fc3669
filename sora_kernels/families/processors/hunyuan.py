"""HunyuanVideo: RMSNorm of every head, then an interleaved rotation of the video's tokens.

Padding at the end of the text is cut off from keys and values instead of masked: the same sums
without the keys that count nothing, and attention backends that are fast only without a mask work.

The order of calls is that of ``HunyuanVideoAttnProcessor2_0.__call__`` in diffusers 0.42.1
(Apache-2.0, The Hunyuan Team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from ...ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_joint
from .._sites import readable_mask, remembered
from ._joint import rope_of, rows_of, same_dtype, why_norms_left


class FusedHunyuanVideoAttnProcessor(HunyuanVideoAttnProcessor2_0):
    """Video before text, projected and normed apart or, in single-stream blocks, together."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if (
            text is None
            or not text.shape[1]
            or why_left(attn) is not None
            or not same_dtype(x, attn.norm_q.weight)
        ):
            return super().__call__(attn, x, text, attention_mask, image_rotary_emb)
        lengths = [x.shape[1], text.shape[1]]
        width = attn.norm_q.weight.shape[0]
        rope = rope_of(image_rotary_emb, x, lengths[0], width, after=lengths[1])
        if image_rotary_emb is not None and rope is None:
            return super().__call__(attn, x, text, attention_mask, image_rotary_emb)
        options: Any = {"rope": rope, "eps": attn.norm_q.eps, "law": self.sora_law}
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if attn.add_q_proj is None:
            both = torch.cat([x, text], dim=1)
            query, key, value = (p(both).unflatten(2, (-1, width)) for p in projections)
            query, key = qk_norm_rope(query, key, attn.norm_q.weight, attn.norm_k.weight, **options)
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query, key, value = qk_norm_rope_joint(
                [
                    [p(t).unflatten(2, (-1, width)) for p in of]
                    for t, of in ((x, projections), (text, added))
                ],
                [attn.norm_q.weight, attn.norm_added_q.weight],
                [attn.norm_k.weight, attn.norm_added_k.weight],
                index=rows_of(lengths, len(x), x.device),
                **options,
            )
        out = self._attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        y, y_text = out.split_with_sizes(lengths, dim=1)
        if getattr(attn, "to_out", None) is not None:
            y = attn.to_out[1](attn.to_out[0](y))
        if getattr(attn, "to_add_out", None) is not None:
            y_text = attn.to_add_out(y_text)
        return y, y_text

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Upstream's attention, of each sample to its own keys where these are known."""
        given = [(query, key, value, mask)]
        lengths = None if self._parallel_config is not None else key_lengths(mask, key)
        if lengths is not None and len(set(lengths)) == 1:
            given = [(query, key[:, : lengths[0]], value[:, : lengths[0]], None)]
        elif lengths is not None:
            given = [
                (query[i : i + 1], key[i : i + 1, :n], value[i : i + 1, :n], None)
                for i, n in enumerate(lengths)
            ]
        outputs = [
            dispatch_attention_fn(
                q,
                k,
                v,
                attn_mask=m,
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            for q, k, v, m in given
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def key_lengths(mask: Any, key: Tensor) -> list[int] | None:
    """How many keys of each sample a mask ``[B, 1, 1, N]`` leaves, if these are its first ones.

    Reads the mask once for all blocks of a step. None (the mask stays) for any other mask, and
    where nothing can be read or kept.
    """
    if not readable_mask(mask) or mask.dtype is not torch.bool:
        return None
    return _lengths(mask) if mask.shape == (key.shape[0], 1, 1, key.shape[1]) else None


@remembered
def _lengths(mask: Tensor) -> list[int] | None:
    keys = mask[:, 0, 0]
    counts = keys.sum(1)
    first = torch.arange(keys.shape[1], device=keys.device) < counts[:, None]
    *lengths, regular = torch.cat([counts, (keys == first).all()[None]]).tolist()
    return lengths if regular and min(lengths) > 0 else None


def why_left(attn: Any) -> str | None:
    """Why the norms of this attention keep upstream's code, or None."""
    if attn.fused_projections:
        return "fused projections"
    names = ["norm_q", "norm_k"]
    if attn.add_q_proj is not None:
        names += ["norm_added_q", "norm_added_k"]
    return why_norms_left(attn, RMSNorm, *names)
