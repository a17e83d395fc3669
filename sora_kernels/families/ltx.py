"""LTX-Video: a modulation table, RMS norms without weight, a cross-attention without a norm.

The order of calls is that of ``transformer_ltx.py`` in diffusers 0.42.1 (Apache-2.0, The Lightricks
team and The HuggingFace Team); attentions and feed-forward are called as modules.
"""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.normalization import RMSNorm
from torch import Tensor

from ..ops.gate_residual import gate_residual
from ..ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ..ops.norm_modulate import norm_modulate
from ._patch import upstream_forward
from ._sites import gated_law, modulates, readable, streams, why_unreadable

Laws = dict[str, int]


def ltx_survey(block: Any) -> dict[str, str]:
    """Sites of an LTX block that keep upstream's code."""
    left = {}
    for site, norm in (("norm1", block.norm1), ("attn2+norm2", block.norm2)):
        reason = why_unreadable(norm, RMSNorm)
        if reason is None and norm.weight is not None:
            reason = "the norm has a weight"
        if reason:
            left[site] = reason
    return left


def ltx_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Any:
    """``LTXVideoTransformerBlock.forward``: one time for a sample or one for every token."""
    x = hidden_states
    table = block.scale_shift_table.to(temb.device)
    if (
        x.ndim != 3
        or temb.ndim != 3
        or temb.shape[0] != x.shape[0]
        or temb.shape[1] not in (1, x.shape[1])
        or not modulates(x, temb, table)
    ):
        return upstream_forward(
            block, x, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask
        )
    tables = table.unbind(0)
    mods = temb.unflatten(2, (len(tables), -1)).unbind(2)  # [B, 1 or L, D] each

    h = _norm(block.norm1, x, mods[0:2], tables[0:2], laws["norm1"])
    y = block.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    x = _gate(x, y, mods[2], tables[2], laws["attn1"])

    y = block.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    if streams(x, y) and _plain(block.norm2):
        x, h = gate_residual_norm_modulate(
            x, y, shift=mods[3], scale=mods[4], shift_table=tables[3], scale_table=tables[4],
            per="frame", norm="rms", eps=block.norm2.eps, law=laws["attn2+norm2"],
            out_dtype=x.dtype,
        )  # fmt: skip
    else:
        x = x + y
        h = _norm(block.norm2, x, mods[3:5], tables[3:5], laws["norm1"])
    y = block.ff(h)
    return _gate(x, y, mods[5], tables[5], laws["ff"])


def _plain(norm: Any) -> bool:
    return readable(norm, RMSNorm) and norm.weight is None


def _norm(norm: Any, x: Tensor, mods: Any, tables: Any, law: int) -> Tensor:
    (shift, scale), (shift_table, scale_table) = mods, tables
    if streams(x) and _plain(norm):
        y = norm_modulate(
            x, shift, scale, shift_table=shift_table, scale_table=scale_table, per="frame",
            norm="rms", eps=norm.eps, law=law,
        )  # fmt: skip
        return cast(Tensor, y)
    y = norm(x) * (1 + (scale_table + scale)) + (shift_table + shift)
    return cast(Tensor, y)


def _gate(x: Tensor, y: Tensor, gate: Tensor, table: Tensor, law: int) -> Tensor:
    if streams(x, y):
        return gate_residual(
            x, y, gate, gate_table=table, per="frame", law=gated_law(law, x.dtype, y)
        )
    return x + y * (table + gate)
