"""Allegro: a modulation table and a cross-attention without a norm before it.

The order of calls is that of ``transformer_allegro.py`` in diffusers 0.42.1 (Apache-2.0, The
RhymesAI and The HuggingFace Team); attentions and feed-forward are called as modules.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..ops.gate_residual import gate_residual
from ..ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ..ops.norm_modulate import norm_modulate
from ._patch import upstream_forward
from ._sites import gated_law, modulates, normed_law, readable, streams, why_unreadable

Laws = dict[str, int]


def allegro_survey(block: Any) -> dict[str, str]:
    """Sites of an Allegro block that keep upstream's code."""
    reasons = {
        "norm1": why_unreadable(block.norm1, nn.LayerNorm),
        "attn2+norm2": why_unreadable(block.norm2, nn.LayerNorm),
    }
    return {site: reason for site, reason in reasons.items() if reason}


def allegro_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Any = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Any:
    """``AllegroTransformerBlock.forward`` for more than one token."""
    x, table = hidden_states, block.scale_shift_table
    if (
        x.ndim != 3
        or x.shape[1] == 1  # upstream drops this dimension
        or block.attn2 is None
        or temb.numel() != x.shape[0] * table.numel()
        or not modulates(x, temb, table)
    ):
        return upstream_forward(
            block, x, encoder_hidden_states, temb, attention_mask, encoder_attention_mask,
            image_rotary_emb,
        )  # fmt: skip
    tables, mods = table.unbind(0), temb.reshape(x.shape[0], 6, -1).unbind(1)

    h = _norm(block.norm1, x, mods[0:2], tables[0:2], laws["norm1"])
    y = block.attn1(
        h,
        encoder_hidden_states=None,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    x = _gate(x, y, mods[2], tables[2], laws["attn1"])
    y = block.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=encoder_attention_mask,
        image_rotary_emb=None,
    )
    if streams(x, y) and readable(block.norm2, nn.LayerNorm):
        x, h = gate_residual_norm_modulate(
            x, y, shift=mods[3], scale=mods[4], shift_table=tables[3], scale_table=tables[4],
            weight=block.norm2.weight, bias=block.norm2.bias, eps=block.norm2.eps,
            law=normed_law(laws["attn2+norm2"], x), out_dtype=x.dtype,
        )  # fmt: skip
    else:
        x = y + x
        h = _norm(block.norm2, x, mods[3:5], tables[3:5], laws["norm1"])
    return _gate(x, block.ff(h), mods[5], tables[5], laws["ff"])


def _norm(norm: Any, x: Tensor, mods: Any, tables: Any, law: int) -> Tensor:
    (shift, scale), (shift_table, scale_table) = mods, tables
    if readable(norm, nn.LayerNorm):
        y = norm_modulate(
            x, shift, scale, shift_table=shift_table, scale_table=scale_table,
            weight=norm.weight, bias=norm.bias, eps=norm.eps, law=normed_law(law, x),
        )  # fmt: skip
        return cast(Tensor, y)
    scale, shift = (scale_table + scale)[:, None], (shift_table + shift)[:, None]
    return cast(Tensor, norm(x) * (1 + scale) + shift)


def _gate(x: Tensor, y: Tensor, gate: Tensor, table: Tensor, law: int) -> Tensor:
    if streams(x, y):
        return gate_residual(x, y, gate, gate_table=table, law=gated_law(law, x.dtype, y))
    return (table + gate)[:, None] * y + x
