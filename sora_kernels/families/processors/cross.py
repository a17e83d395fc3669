"""PixArt and Allegro: cross-attentions whose mask may leave few text tokens.

The order of calls is that of ``AttnProcessor2_0.__call__`` and ``AllegroAttnProcessor2_0.__call__``
in diffusers 0.42.1 (Apache-2.0, The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AllegroAttnProcessor2_0, AttnProcessor2_0

from ._masked import cross_attention, packed_keys


class PackedAttnProcessor(AttnProcessor2_0):
    """Packed where the mask of the text leaves few tokens; anything else runs upstream's code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        keys = packed_keys(mask, x, text) if why_left(attn) is None else None
        if keys is None:
            return super().__call__(attn, x, text, mask, *args, **kwargs)
        return cross_attention(attn, x, text, keys)


class PackedAllegroAttnProcessor(AllegroAttnProcessor2_0):
    """The same of Allegro, which turns no q and k of a cross-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        keys = packed_keys(mask, x, text) if why_left(attn) is None else None
        if keys is None:
            return super().__call__(attn, x, text, mask, temb, image_rotary_emb)
        return cross_attention(attn, x, text, keys)


def why_left(attn: Any) -> str | None:
    """Why an attention of diffusers' first kind keeps upstream's code, or None."""
    if not attn.is_cross_attention:
        return "not a cross-attention"
    if attn.spatial_norm is not None or attn.group_norm is not None or attn.norm_cross:
        return "a norm before the projections"
    if attn.norm_q is not None or attn.norm_k is not None:
        return "norms of q and k"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "a residual or a factor inside the attention"
    return None
