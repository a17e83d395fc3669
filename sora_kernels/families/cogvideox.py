"""CogVideoX: video and text share each affine norm, the feed-forward and the attention's weights.

The order of calls is that of ``cogvideox_transformer_3d.py`` in diffusers 0.42.1 (Apache-2.0, The
CogVideoX team, Tsinghua University & ZhipuAI and The HuggingFace Team); linear layers, attentions
and feed-forwards are called as modules, so LoRA, quantised layers, offloading and sharding act as
before.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from torch import Tensor

from ._adaln import gated, gated_modulated, modulated, why_left

Laws = dict[str, int]


def cogvideox_survey(block: Any) -> dict[str, str]:
    """Sites of a block that keep upstream's code."""
    left: dict[str, str] = {}
    for norm, site in ((block.norm1, "norm1"), (block.norm2, "attn1+norm2")):
        reason = why_left(norm, CogVideoXLayerNormZero)
        if reason:
            left |= {site: reason, f"{site}.text": reason}
    return left


def cogvideox_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``CogVideoXBlock.forward``."""
    x, text = hidden_states, encoder_hidden_states
    length = text.shape[1]
    mods = _modulation(block.norm1, temb)
    if mods is not None:
        (shift, scale, gate), (shift_text, scale_text, gate_text) = mods
        norm = block.norm1.norm
        h = modulated(norm, x, shift, scale, laws["norm1"])
        h_text = modulated(norm, text, shift_text, scale_text, laws["norm1.text"])
    else:
        h, h_text, gate, gate_text = _called(block.norm1, x, text, temb)

    y, y_text = block.attn1(
        hidden_states=h,
        encoder_hidden_states=h_text,
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )

    law, law_text = laws["attn1+norm2"], laws["attn1+norm2.text"]
    mods = _modulation(block.norm2, temb)
    if mods is not None:
        (shift, scale, gate2), (shift_text, scale_text, gate2_text) = mods
        norm = block.norm2.norm
        x, h = gated_modulated(norm, x, y, gate, shift, scale, law)
        text, h_text = gated_modulated(
            norm, text, y_text, gate_text, shift_text, scale_text, law_text
        )
    else:
        x, text = gated(x, y, gate, law), gated(text, y_text, gate_text, law_text)
        h, h_text, gate2, gate2_text = _called(block.norm2, x, text, temb)

    y = block.ff(torch.cat([h_text, h], dim=1))
    x = gated(x, y[:, length:], gate2, laws["ff"])
    return x, gated(text, y[:, :length], gate2_text, laws["ff.text"])


def _modulation(adaln: Any, temb: Tensor) -> tuple[Any, Any] | None:
    """Shift, scale and gate of the video and of the text; None if ``adaln`` must be called."""
    if why_left(adaln, CogVideoXLayerNormZero) is not None:
        return None
    chunks = adaln.linear(adaln.silu(temb)).chunk(6, dim=1)
    return chunks[:3], chunks[3:]


def _called(adaln: Any, x: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    h, h_text, gate, gate_text = adaln(x, text, temb)
    return h, h_text, gate.squeeze(1), gate_text.squeeze(1)
