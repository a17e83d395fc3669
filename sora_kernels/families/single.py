"""One stream of image (or video) and text, attention and MLP side by side: Flux, HunyuanVideo.

The order of calls is that of diffusers 0.42.1 (Apache-2.0, The HuggingFace Team and the authors of
the models): ``transformer_flux.py`` (Black Forest Labs), ``transformer_hunyuan_video.py`` (The
Hunyuan Team). Linear layers and attentions are called as modules, so LoRA, quantised layers,
offloading and sharding act as before.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
)
from torch import Tensor

from ._adaln import gated, why_left, zero
from ._token_replace import prefix_rows, zero_replaced

Laws = dict[str, int]


def single_survey(block: Any) -> dict[str, str]:
    """Sites of a single-stream block that keep upstream's code."""
    reason = why_left(
        block.norm, AdaLayerNormZeroSingle, HunyuanVideoTokenReplaceAdaLayerNormZeroSingle
    )
    return {"norm": reason} if reason else {}


# --- Flux ---------------------------------------------------------------------------------------


def flux_single(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxSingleTransformerBlock.forward``: text first."""
    text_length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    h, gate = zero(block.norm, x, temb, laws["norm"])
    mlp = block.act_mlp(block.proj_mlp(h))
    y = block.attn(
        hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    y = block.proj_out(torch.cat([y, mlp], dim=2))
    x = gated(x, y, gate, laws["proj_out"])
    if x.dtype == torch.float16:
        x = x.clip(-65504, 65504)
    return x[:, :text_length], x[:, text_length:]


# --- HunyuanVideo -------------------------------------------------------------------------------


def hunyuan_single(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """``HunyuanVideoSingleTransformerBlock.forward``, which ignores what follows
    ``image_rotary_emb``, and that of ``HunyuanVideoTokenReplaceSingleTransformerBlock``: the first
    ``num_tokens`` are those of a given frame, with a modulation of their own. Text comes last."""
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    length = encoder_hidden_states.shape[1]
    rows = None
    if isinstance(block, HunyuanVideoTokenReplaceSingleTransformerBlock):
        rows = prefix_rows(x, num_tokens)
        h, gate = zero_replaced(
            block.norm, x, temb, token_replace_emb, num_tokens, rows, laws["norm"]
        )
    else:
        h, gate = zero(block.norm, x, temb, laws["norm"])
    mlp = block.act_mlp(block.proj_mlp(h))
    y, y_text = block.attn(
        hidden_states=h[:, :-length],
        encoder_hidden_states=h[:, -length:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    y = block.proj_out(torch.cat([torch.cat([y, y_text], dim=1), mlp], dim=2))
    x = gated(x, y, gate, laws["proj_out"], rows)
    return x[:, :-length], x[:, -length:]
