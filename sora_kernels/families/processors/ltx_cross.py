"""LTX-Video: a cross-attention whose mask may leave few text tokens.

The order of calls is that of ``LTXVideoAttnProcessor.__call__`` in diffusers 0.42.1 (Apache-2.0,
The Lightricks team and The HuggingFace Team).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

from ._masked import cross_attention, packed_keys


class PackedLTXVideoAttnProcessor(LTXVideoAttnProcessor):
    """Packed where the mask of the text leaves few tokens; anything else runs upstream's code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        keys = None
        if image_rotary_emb is None and why_left(attn) is None and not self._chosen():
            keys = packed_keys(mask, x, text)
        if keys is None:
            return super().__call__(attn, x, text, mask, image_rotary_emb)
        return cross_attention(attn, x, text, keys, norms=True)

    def _chosen(self) -> bool:
        """Whether somebody asked for an attention of theirs or split it over devices."""
        chosen = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        return chosen != AttentionBackendName.NATIVE or self._parallel_config is not None


def why_left(attn: Any) -> str | None:
    """Why this attention keeps upstream's code, or None."""
    return "keys have fewer heads than queries" if attn.inner_dim != attn.inner_kv_dim else None
