"""Two streams, image (or video) and text, that meet in one attention: Flux, HunyuanVideo, SD3.

The order of calls is that of diffusers 0.42.1 (Apache-2.0, The HuggingFace Team and the authors of
the models): ``transformer_flux.py`` (Black Forest Labs), ``transformer_hunyuan_video.py`` (The
Hunyuan Team), ``attention.py`` (Stability AI). Linear layers, attentions and feed-forwards are
called as modules, so LoRA, quantised layers, offloading and sharding act as before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention import _chunked_feed_forward
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTokenReplaceAdaLayerNormZero,
    HunyuanVideoTokenReplaceTransformerBlock,
)
from torch import Tensor, nn

from ._adaln import continuous, gated, gated_modulated, why_left, zero, zero_x
from ._sites import why_unreadable
from ._token_replace import prefix_rows, zero_replaced

Laws = dict[str, int]


def _left(reasons: dict[str, str | None]) -> dict[str, str]:
    return {site: reason for site, reason in reasons.items() if reason}


def double_survey(block: Any) -> dict[str, str]:
    """Sites of a two-stream block that keep upstream's code."""
    return _left(
        {
            "norm1": why_left(
                block.norm1, AdaLayerNormZero, HunyuanVideoTokenReplaceAdaLayerNormZero
            ),
            "norm1_context": why_left(block.norm1_context, AdaLayerNormZero),
            "attn+norm2": why_unreadable(block.norm2, nn.LayerNorm),
            "attn+norm2_context": why_unreadable(block.norm2_context, nn.LayerNorm),
        }
    )


# --- Flux ---------------------------------------------------------------------------------------


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


# --- HunyuanVideo -------------------------------------------------------------------------------


def hunyuan_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """``HunyuanVideoTransformerBlock.forward``, which ignores what follows ``freqs_cis``, and that
    of ``HunyuanVideoTokenReplaceTransformerBlock``: the first ``num_tokens`` of the video are those
    of a given frame, with a modulation of their own."""
    x, text = hidden_states, encoder_hidden_states
    rows = None
    if isinstance(block, HunyuanVideoTokenReplaceTransformerBlock):
        rows = prefix_rows(x, num_tokens)
        h, gate, shift, scale, gate2 = zero_replaced(
            block.norm1, x, temb, token_replace_emb, num_tokens, rows, laws["norm1"]
        )
    else:
        h, gate, shift, scale, gate2 = zero(block.norm1, x, temb, laws["norm1"])
    h_text, gate_text, shift_text, scale_text, gate2_text = zero(
        block.norm1_context, text, temb, laws["norm1_context"]
    )
    y, y_text = block.attn(
        hidden_states=h,
        encoder_hidden_states=h_text,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    x, h = gated_modulated(block.norm2, x, y, gate, shift, scale, laws["attn+norm2"], rows)
    text, h_text = gated_modulated(
        block.norm2_context, text, y_text, gate_text, shift_text, scale_text,
        laws["attn+norm2_context"],
    )  # fmt: skip
    y, y_text = block.ff(h), block.ff_context(h_text)
    x = gated(x, y, gate2, laws["ff"], rows)
    return x, gated(text, y_text, gate2_text, laws["ff_context"])


# --- SD3 ----------------------------------------------------------------------------------------


def sd3_survey(block: Any) -> dict[str, str]:
    """Sites of a block of SD3 or SD3.5 that keep upstream's code."""
    last = block.context_pre_only
    return _left(
        {
            "norm1": why_left(
                block.norm1, SD35AdaLayerNormZeroX if block.use_dual_attention else AdaLayerNormZero
            ),
            "norm1_context": why_left(
                block.norm1_context, AdaLayerNormContinuous if last else AdaLayerNormZero
            ),
            "attn+norm2": why_unreadable(block.norm2, nn.LayerNorm),
            "attn+norm2_context": None
            if last
            else why_unreadable(block.norm2_context, nn.LayerNorm),
        }
    )


def sd3_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``JointTransformerBlock.forward``: with a second attention of the image alone or without;
    the last block ends the text."""
    x, text = hidden_states, encoder_hidden_states
    options = joint_attention_kwargs or {}
    first = zero_x if block.use_dual_attention else zero
    h, gate, shift, scale, gate2, *dual = first(block.norm1, x, temb, laws["norm1"])
    if block.context_pre_only:
        h_text = continuous(block.norm1_context, text, temb, laws["norm1_context"])
    else:
        h_text, gate_text, shift_text, scale_text, gate2_text = zero(
            block.norm1_context, text, temb, laws["norm1_context"]
        )
    y, y_text = block.attn(hidden_states=h, encoder_hidden_states=h_text, **options)
    second = None
    if dual:
        second = block.attn2(hidden_states=dual[0], **options), dual[1]

    x, h = gated_modulated(block.norm2, x, y, gate, shift, scale, laws["attn+norm2"], second=second)
    x = gated(x, _feed_forward(block, block.ff, h), gate2, laws["ff"])
    if block.context_pre_only:
        return None, x

    text, h_text = gated_modulated(
        block.norm2_context, text, y_text, gate_text, shift_text, scale_text,
        laws["attn+norm2_context"],
    )  # fmt: skip
    y_text = _feed_forward(block, block.ff_context, h_text)
    return gated(text, y_text, gate2_text, laws["ff_context"]), x


def _feed_forward(block: Any, ff: Any, h: Tensor) -> Tensor:
    if block._chunk_size is None:
        return cast(Tensor, ff(h))
    return cast(Tensor, _chunked_feed_forward(ff, h, block._chunk_dim, block._chunk_size))
