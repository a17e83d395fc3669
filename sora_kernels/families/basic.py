"""``BasicTransformerBlock``: DiT (adaLN-Zero), PixArt and Latte (adaLN-single).

The order of calls is that of ``models/attention.py`` in diffusers 0.42.1 (Apache-2.0, The
HuggingFace Team). GLIGEN, chunked feed-forward, positional embeddings inside the block and other
keyword arguments of the attention go to upstream's forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.normalization import AdaLayerNormZero
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


def _survey(block: Any, norms: dict[str, nn.Module]) -> dict[str, str]:
    if block.only_cross_attention:
        return {"": "cross-attention only"}
    if block.pos_embed is not None:
        return {"": "a positional embedding inside the block"}
    reasons = {site: why_unreadable(norm, nn.LayerNorm) for site, norm in norms.items()}
    return {site: reason for site, reason in reasons.items() if reason}


def _restated(block: Any, x: Tensor, kwargs: Any) -> bool:
    """Whether this call is one that the adapters below restate."""
    return x.ndim == 3 and streams(x) and not kwargs and block._chunk_size is None


# --- DiT ----------------------------------------------------------------------------------------


def dit_survey(block: Any) -> dict[str, str]:
    if block.attn2 is not None:
        return {"": "adaLN-Zero with a cross-attention"}
    if not untouched(block.norm1, AdaLayerNormZero):
        return {"norm1": "norm1 is not a plain AdaLayerNormZero"}
    return _survey(block, {"norm1": block.norm1.norm, "attn1+norm3": block.norm3})


def dit_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Any:
    """``BasicTransformerBlock.forward`` with ``norm_type="ada_norm_zero"``."""
    x = hidden_states
    if not _restated(block, x, cross_attention_kwargs):
        return upstream_forward(
            block, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    norm1 = block.norm1
    whole = untouched(norm1, AdaLayerNormZero) and norm1.emb is not None
    if whole and readable(norm1.norm, nn.LayerNorm):
        emb = norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        emb = norm1.linear(norm1.silu(emb))
        shift, scale, gate1, shift2, scale2, gate2 = emb.chunk(6, 1)
        h = _norm(norm1.norm, x, shift, scale, laws["norm1"])
    else:
        h, gate1, shift2, scale2, gate2 = norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    y = block.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask)
    x, h = _gate_norm(block.norm3, x, y, gate1, shift2, scale2, laws["attn1+norm3"], laws)
    return _gate(x, block.ff(h), gate2, laws["ff"])


def _norm(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, law: int) -> Tensor:
    if readable(norm, nn.LayerNorm) and promotes(x, scale) and scale.shape[0] == x.shape[0]:
        y = norm_modulate(
            x,
            shift,
            scale_for(scale, x),
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            law=normed_law(law, x),
        )
        return cast(Tensor, y)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def _gate_norm(
    norm: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, law: int,
    laws: Laws,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    fits = streams(x, y) and promotes(x, scale, gate) and scale.shape[0] == x.shape[0]
    if fits and readable(norm, nn.LayerNorm):
        return gate_residual_norm_modulate(
            x, y, gate, shift, scale_for(scale, x), weight=norm.weight, bias=norm.bias,
            eps=norm.eps, law=gated_law(normed_law(law, x), gate.dtype, y), out_dtype=x.dtype,
        )  # fmt: skip
    x = _gate(x, y, gate, laws["ff"])
    return x, _norm(norm, x, shift, scale, laws["norm1"])


def _gate(x: Tensor, y: Tensor, gate: Tensor, law: int) -> Tensor:
    if streams(x, y) and promotes(x, gate) and gate.shape[0] == x.shape[0]:
        return gate_residual(x, y, gate, law=gated_law(law, gate.dtype, y))
    return gate.unsqueeze(1) * y + x


# --- PixArt, Latte ------------------------------------------------------------------------------


def single_survey(block: Any) -> dict[str, str]:
    second = "attn1+norm2" if block.attn2 is None else "attn2+norm2"
    return _survey(block, {"norm1": block.norm1, second: block.norm2})


def single_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Any:
    """``BasicTransformerBlock.forward`` with ``norm_type="ada_norm_single"``."""
    x, t, table = hidden_states, timestep, block.scale_shift_table
    wide = None if t is None else torch.promote_types(t.dtype, table.dtype)
    if (
        t is None
        or not plain(t, table)
        or not _restated(block, x, cross_attention_kwargs)
        or wide is not x.dtype
        or t.numel() != x.shape[0] * table.numel()
    ):
        return upstream_forward(
            block, x, attention_mask, encoder_hidden_states, encoder_attention_mask, t,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    tables, mods = table.unbind(0), t.reshape(x.shape[0], 6, -1).unbind(1)

    h = _single_norm(block.norm1, x, mods[0:2], tables[0:2], laws["norm1"])
    y = block.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask)
    gated: dict[str, Any] = {"gate": mods[2], "gate_table": tables[2]}
    if block.attn2 is not None:
        x = _single_gate(x, y, gated, laws["attn1"])
        y = block.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        gated, law = {}, laws["attn2+norm2"]
    else:
        law = laws["attn1+norm2"]
    if streams(x, y) and readable(block.norm2, nn.LayerNorm):
        x, h = gate_residual_norm_modulate(
            x, y, **gated, shift=mods[3], scale=mods[4], shift_table=tables[3],
            scale_table=tables[4], weight=block.norm2.weight, bias=block.norm2.bias,
            eps=block.norm2.eps, law=gated_law(normed_law(law, x), x.dtype, y), out_dtype=x.dtype,
        )  # fmt: skip
    else:
        x = _single_gate(x, y, gated, laws["ff"]) if gated else y + x
        h = _single_norm(block.norm2, x, mods[3:5], tables[3:5], laws["norm1"])
    return _single_gate(x, block.ff(h), {"gate": mods[5], "gate_table": tables[5]}, laws["ff"])


def _single_norm(norm: Any, x: Tensor, mods: Any, tables: Any, law: int) -> Tensor:
    (shift, scale), (shift_table, scale_table) = mods, tables
    if readable(norm, nn.LayerNorm):
        y = norm_modulate(
            x, shift, scale, shift_table=shift_table, scale_table=scale_table,
            weight=norm.weight, bias=norm.bias, eps=norm.eps, law=normed_law(law, x),
        )  # fmt: skip
        return cast(Tensor, y)
    scale, shift = (scale_table + scale)[:, None], (shift_table + shift)[:, None]
    return norm(x) * (1 + scale) + shift


def _single_gate(x: Tensor, y: Tensor, gate: dict[str, Any], law: int) -> Tensor:
    if streams(x, y):
        return gate_residual(x, y, **gate, law=gated_law(law, x.dtype, y))
    return (gate["gate_table"] + gate["gate"])[:, None] * y + x
