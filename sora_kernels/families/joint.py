"""Two streams, image (or video) and text, that meet in one attention: Flux.

The order of calls is that of diffusers 0.42.1 (Apache-2.0, The HuggingFace Team and the authors of
the models): ``transformer_flux.py`` (Black Forest Labs). Linear layers, attentions and
feed-forwards are called as modules, so LoRA, quantised layers, offloading and sharding act as
before.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from ._adaln import gated, gated_modulated, why_left, zero
from ._sites import why_unreadable

Laws = dict[str, int]


def _left(reasons: dict[str, str | None]) -> dict[str, str]:
    return {site: reason for site, reason in reasons.items() if reason}


# --- Flux ---------------------------------------------------------------------------------------


def double_survey(block: Any) -> dict[str, str]:
    """Sites of a two-stream block that keep upstream's code."""
    return _left(
        {
            "norm1": why_left(block.norm1, AdaLayerNormZero),
            "norm1_context": why_left(block.norm1_context, AdaLayerNormZero),
            "attn+norm2": why_unreadable(block.norm2, nn.LayerNorm),
            "attn+norm2_context": why_unreadable(block.norm2_context, nn.LayerNorm),
        }
    )


def flux_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxTransformerBlock.forward``; an IP-adapter's output joins after the feed-forward."""
    x, text = hidden_states, encoder_hidden_states
    h, gate, shift, scale, gate2 = zero(block.norm1, x, temb, laws["norm1"])
    h_text, gate_text, shift_text, scale_text, gate2_text = zero(
        block.norm1_context, text, temb, laws["norm1_context"]
    )
    y, y_text, *y_ip = block.attn(
        hidden_states=h,
        encoder_hidden_states=h_text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )

    x, h = gated_modulated(block.norm2, x, y, gate, shift, scale, laws["attn+norm2"])
    x = gated(x, block.ff(h), gate2, laws["ff"])
    for y in y_ip:
        x = x + y

    text, h_text = gated_modulated(
        block.norm2_context, text, y_text, gate_text, shift_text, scale_text,
        laws["attn+norm2_context"],
    )  # fmt: skip
    text = gated(text, block.ff_context(h_text), gate2_text, laws["ff_context"])
    if text.dtype == torch.float16:
        text = text.clip(-65504, 65504)
    return text, x
