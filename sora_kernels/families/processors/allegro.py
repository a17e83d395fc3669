"""Allegro: thirds of a head turn with time, height and width, each in halves of its own.

The order of calls is that of ``AllegroAttnProcessor2_0.__call__`` in diffusers 0.42.1 (Apache-2.0,
The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from torch import Tensor
from torch.nn import functional

from ...ops.qk_norm_rope import qk_norm_rope
from ...packing import Rope
from .._sites import FLOATS


class FusedAllegroAttnProcessor(AllegroAttnProcessor2_0):
    """Self-attention of tokens; anything else runs upstream's code."""

    sora_law: int = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if (
            image_rotary_emb is None
            or encoder_hidden_states is not None
            or hidden_states.ndim != 3
            or hidden_states.dtype not in FLOATS
            or why_left(attn) is not None
            or not _one_grid(*image_rotary_emb)
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb
            )
        batch, length, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        q, k, v = (
            linear(hidden_states).unflatten(2, (attn.heads, -1))
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        rope = _rope(*image_rotary_emb)
        q, k = qk_norm_rope(q, k, rope=rope, norm=None, pairing="half_per_axis", law=self.sora_law)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        out = out.transpose(1, 2).flatten(2, 3).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def why_left(attn: Any) -> str | None:
    """Why the rotation of this attention keeps upstream's code, or None."""
    if attn.is_cross_attention:
        return "a cross-attention"
    if attn.spatial_norm is not None or attn.group_norm is not None:
        return "a norm before the projections"
    if attn.residual_connection:
        return "a residual inside the attention"
    return None


def _one_grid(tables: Any, positions: Any) -> bool:
    """fp32 tables of even thirds, and one grid for all samples."""
    return all(p.shape[0] == 1 for p in positions) and all(
        cos.element_size() >= 4 and cos.shape[-1] % 2 == 0 for cos, _ in tables
    )


def _rope(tables: Any, positions: Any) -> Rope:
    """Upstream's tables ``[P, D / 3]`` of an axis hold every angle twice, half after half."""
    longest = max(len(cos) for cos, _ in tables)

    def columns(table: Tensor) -> Tensor:
        half = table[:, : table.shape[-1] // 2]
        return functional.pad(half, (0, 0, 0, longest - len(half)))

    cos, sin = (torch.cat([columns(pair[i]) for pair in tables], -1).float() for i in (0, 1))
    index = torch.stack([p[0] for p in positions], -1).int()
    return Rope(cos, sin, index, tuple(pair[0].shape[-1] for pair in tables))
