"""Mochi: every branch between two RMS norms, scales without shifts, gates through a tanh.

The order of calls is that of ``transformer_mochi.py`` in diffusers 0.42.1 (Apache-2.0, The Genmo
team and The HuggingFace Team); linear layers, attention and feed-forwards are called as modules.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_mochi import (
    MochiLayerNormContinuous,
    MochiModulatedRMSNorm,
    MochiRMSNormZero,
)
from torch import Tensor

from ..ops.gate_residual import gate_residual
from ..ops.norm_modulate import norm_modulate
from ._patch import upstream_forward
from ._sites import FLOATS, plain, streams, why_unreadable

Laws = dict[str, int]

_NORMS = {
    "norm1": "norm1",
    "norm1_context": "norm1_context",
    "attn1": "norm2",
    "norm3": "norm3",
    "ff": "norm4",
    "attn1_context": "norm2_context",
    "norm3_context": "norm3_context",
    "ff_context": "norm4_context",
}


def mochi_survey(block: Any) -> dict[str, str]:
    """Sites of a Mochi block that keep upstream's code."""
    left = {}
    for site, name in _NORMS.items():
        norm = getattr(block, name)
        reason = None if norm is None else _why_unreadable(norm)
        if reason:
            left[site] = reason
    return left


def mochi_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Any = None,
) -> Any:
    """``MochiTransformerBlock.forward``; the last block leaves the text as it came."""
    x, text = hidden_states, encoder_hidden_states
    if x.ndim != 3 or text.ndim != 3 or temb.ndim != 2 or not (streams(x) and streams(text)):
        return upstream_forward(block, x, text, temb, encoder_attention_mask, image_rotary_emb)
    both = not block.context_pre_only
    h, gates = _first(block.norm1, x, temb, laws["norm1"])
    text_gates: Any = ()
    if both:
        h_text, text_gates = _first(block.norm1_context, text, temb, laws["norm1_context"])
    else:
        h_text = _continuous(block.norm1_context, text, temb, laws["norm1_context"])
    y, y_text = block.attn1(
        hidden_states=h,
        encoder_hidden_states=h_text,
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    x = _rest(block, laws, "", x, y, gates)
    if both:
        text = _rest(block, laws, "_context", text, y_text, text_gates)
    return x, text


def _rest(block: Any, laws: Laws, stream: str, x: Tensor, y: Tensor, mods: Any) -> Tensor:
    """What follows the attention in one of the two streams."""
    norm2, norm3, norm4, ff = (
        getattr(block, n + stream) for n in ("norm2", "norm3", "norm4", "ff")
    )
    gate, scale, gate_ff = mods
    x = _sandwich(norm2, x, y, gate, laws["attn1" + stream])
    if streams(x) and plain(scale) and _readable(norm3):
        h = _scaled(norm3.norm, x, scale, laws["norm3" + stream])
    else:
        h = norm3(x, 1 + scale.unsqueeze(1).to(torch.float32))
    return _sandwich(norm4, x, ff(h), gate_ff, laws["ff" + stream])


def _why_unreadable(norm: Any) -> str | None:
    """Norms of Mochi hold one of diffusers; both must be plain."""
    classes = (MochiRMSNormZero, MochiLayerNormContinuous, MochiModulatedRMSNorm)
    reason = why_unreadable(norm, *classes)
    inner = norm
    while reason is None and not isinstance(inner, RMSNorm):
        inner = inner.norm
        reason = why_unreadable(inner, MochiModulatedRMSNorm, RMSNorm)
    if reason is None and inner.weight is not None:
        reason = "the norm has a weight"
    return reason


def _readable(norm: Any) -> bool:
    return _why_unreadable(norm) is None


def _scaled(norm: Any, x: Tensor, scale: Tensor, law: int) -> Tensor:
    return cast(Tensor, norm_modulate(x, None, scale, norm="rms", eps=norm.eps, law=law))


def _first(norm: Any, x: Tensor, temb: Tensor, law: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``MochiRMSNormZero``: the normed stream, and gate, scale, gate of what follows."""
    if not _readable(norm):
        h, *mods = norm(x, temb)
        return h, tuple(mods)
    scale, *mods = norm.linear(norm.silu(temb)).chunk(4, dim=1)
    if not plain(scale):
        h = norm.norm(x.to(torch.float32)) * (1 + scale[:, None].to(torch.float32))
        return h.to(x.dtype), tuple(mods)
    return _scaled(norm.norm, x, scale, law), tuple(mods)


def _continuous(norm: Any, x: Tensor, temb: Tensor, law: int) -> Tensor:
    """``MochiLayerNormContinuous``."""
    if not _readable(norm):
        return cast(Tensor, norm(x, temb))
    scale = norm.linear_1(norm.silu(temb).to(x.dtype))
    if not plain(scale):
        return cast(Tensor, norm.norm(x, 1 + scale.unsqueeze(1).to(torch.float32)))
    return _scaled(norm.norm.norm, x, scale, law)


def _sandwich(norm: Any, x: Tensor, y: Tensor, gate: Tensor, law: int) -> Tensor:
    taken = plain(gate) and gate.dtype is y.dtype and gate.dtype in FLOATS
    if taken and streams(x, y) and _readable(norm):
        return gate_residual(x, y, gate, tanh=True, norm="rms", eps=norm.norm.eps, law=law)
    return x + cast(Tensor, norm(y, torch.tanh(gate).unsqueeze(1)))
