"""Cosmos: three LayerNorms, each modulated through a low-rank projection of its own.

The order of calls is that of ``transformer_cosmos.py`` in diffusers 0.42.1 (Apache-2.0, The NVIDIA
Team and The HuggingFace Team); linear layers, attentions and feed-forward are called as modules.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.transformers.transformer_cosmos import CosmosAdaLayerNormZero
from torch import Tensor, nn

from ..ops.gate_residual import gate_residual
from ..ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ..ops.norm_modulate import norm_modulate
from ._patch import upstream_forward
from ._sites import (
    gated_law,
    normed_law,
    plain,
    promotes,
    readable,
    scale_for,
    streams,
    untouched,
    why_unreadable,
)

Laws = dict[str, int]
Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale, gate: [B, 1 or L, D] each


def cosmos_survey(block: Any) -> dict[str, str]:
    """Sites of a Cosmos block that keep upstream's code."""
    left = {}
    norms = {"norm1": "norm1", "attn1+norm2": "norm2", "attn2+norm3": "norm3"}
    for site, name in norms.items():
        norm = getattr(block, name)
        if not untouched(norm, CosmosAdaLayerNormZero):
            left[site] = f"{name} is not a plain CosmosAdaLayerNormZero"
        else:
            reason = why_unreadable(norm.norm, nn.LayerNorm)
            if reason:
                left[site] = reason
    return left


def cosmos_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Any = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Any:
    """``CosmosTransformerBlock.forward``: a time for a sample or for every token."""
    x, emb = hidden_states, embedded_timestep
    if x.ndim != 3 or emb.ndim not in (2, 3) or not streams(x):
        return upstream_forward(
            block, x, encoder_hidden_states, emb, temb, image_rotary_emb, extra_pos_emb,
            attention_mask, controlnet_residual, latents, block_idx,
        )  # fmt: skip
    if block.before_proj is not None:
        x = block.before_proj(x) + latents
    if extra_pos_emb is not None:
        x = x + extra_pos_emb

    h, gate = _norm(block.norm1, x, emb, temb, laws["norm1"])
    y = block.attn1(h, image_rotary_emb=image_rotary_emb)
    x, h, gate = _gate_norm(block.norm2, x, y, gate, emb, temb, laws, "attn1+norm2")
    y = block.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    x, h, gate = _gate_norm(block.norm3, x, y, gate, emb, temb, laws, "attn2+norm3")
    x = _gate(x, block.ff(h), gate, laws["ff"])

    if controlnet_residual is not None:
        assert block.after_proj is None
        x += controlnet_residual
    if block.after_proj is not None:
        assert controlnet_residual is None
        return x, block.after_proj(x)
    return x


def _readable(norm: Any) -> bool:
    return untouched(norm, CosmosAdaLayerNormZero) and readable(norm.norm, nn.LayerNorm)


def _fits(x: Tensor, mod: Tensor) -> bool:
    """A row for a sample or for every token, which leaves the stream in its dtype."""
    rows = mod.shape[0] == x.shape[0] and mod.shape[1] in (1, x.shape[1])
    return rows and promotes(x, mod) and plain(mod)


def _modulation(norm: Any, emb: Tensor, temb: Tensor | None) -> Modulation:
    mod = norm.linear_2(norm.linear_1(norm.activation(emb)))
    if temb is not None:
        mod = mod + temb
    if mod.ndim == 2:
        mod = mod.unsqueeze(1)
    return cast(Modulation, mod.chunk(3, dim=-1))


def _apply(norm: Any, x: Tensor, mod: Modulation, law: int) -> tuple[Tensor, Tensor]:
    shift, scale, gate = mod
    if not (streams(x) and _fits(x, scale)):
        return norm.norm(x) * (1 + scale) + shift, gate
    y = norm_modulate(
        x, shift, scale_for(scale, x), per="frame", weight=norm.norm.weight, bias=norm.norm.bias,
        eps=norm.norm.eps, law=normed_law(law, x),
    )  # fmt: skip
    return cast(Tensor, y), gate


def _norm(
    norm: Any, x: Tensor, emb: Tensor, temb: Tensor | None, law: int
) -> tuple[Tensor, Tensor]:
    """What ``norm(x, emb, temb)`` returns: the modulated stream and the gate of the branch."""
    if not _readable(norm):
        return cast(tuple[Tensor, Tensor], norm(x, emb, temb))
    return _apply(norm, x, _modulation(norm, emb, temb), law)


def _gate_norm(
    norm: Any,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    emb: Tensor,
    temb: Tensor | None,
    laws: Laws,
    site: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + gate * y``, and what ``norm`` makes of it."""
    if not _readable(norm):
        x = _gate(x, y, gate, laws["ff"])
        return x, *_norm(norm, x, emb, temb, laws["norm1"])
    mod = _modulation(norm, emb, temb)
    if not (streams(x, y) and _fits(x, gate) and _fits(x, mod[0]) and mod[0].shape == gate.shape):
        x = _gate(x, y, gate, laws["ff"])
        return x, *_apply(norm, x, mod, laws["norm1"])
    x, h = gate_residual_norm_modulate(
        x, y, gate, mod[0], scale_for(mod[1], x), per="frame", weight=norm.norm.weight,
        bias=norm.norm.bias, eps=norm.norm.eps,
        law=gated_law(normed_law(laws[site], x), gate.dtype, y), out_dtype=x.dtype,
    )  # fmt: skip
    return x, h, mod[2]


def _gate(x: Tensor, y: Tensor, gate: Tensor, law: int) -> Tensor:
    if streams(x, y) and _fits(x, gate):
        return gate_residual(x, y, gate, per="frame", law=gated_law(law, gate.dtype, y))
    return x + gate * y
