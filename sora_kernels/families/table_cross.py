"""Blocks with a modulation table and a cross-attention between self-attention and feed-forward.

Wan 2.1/2.2. The order of calls is that of ``transformer_wan.py`` in diffusers 0.42.1
(Apache-2.0, The Wan Team and The HuggingFace Team); linear layers, attentions and feed-forwards are
called as modules, so LoRA, quantised layers, offloading and sharding act as before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ..ops.gate_residual import gate_residual
from ..ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from ..ops.norm_modulate import norm_modulate
from ._data import ABSENT
from ._patch import upstream_forward
from ._sites import plain, readable, streams, why_unreadable

Laws = dict[str, int]

# --- Wan ----------------------------------------------------------------------------------------


def wan_survey(block: Any) -> dict[str, str]:
    """Sites of a Wan block that keep upstream's code."""
    left = {}
    for site, norm in (("norm1", block.norm1), ("attn2+norm3", block.norm3)):
        reason = why_unreadable(norm, FP32LayerNorm)
        if reason:
            left[site] = reason
    reason = why_unreadable(block.norm2, FP32LayerNorm)
    if isinstance(block.norm2, nn.Identity):
        left["attn1+norm2"] = ABSENT
    elif reason:  # the residual before it is fused all the same
        left["attn1+norm2"] = reason
    else:
        left["attn1"] = ABSENT
    return left


def wan_block(
    block: Any,
    laws: Laws,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Any:
    """``WanTransformerBlock.forward``: fp32 modulation, every step back in the stream's dtype."""
    x = hidden_states
    known = x.ndim == 3 and temb.ndim in (3, 4) and temb.shape[0] == x.shape[0]
    if not known or not streams(x) or not plain(temb, block.scale_shift_table):
        return upstream_forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    tables = block.scale_shift_table[0].unbind(0)
    per = "token" if temb.ndim == 4 else "sample"  # Wan 2.2 ti2v: a time for every token
    mods = temb.unbind(-2)

    h = _wan_norm(block.norm1, x, mods[0:2], tables[0:2], per, laws["norm1"])
    y = block.attn1(h, None, None, rotary_emb)

    gate: Any = {"gate": mods[2], "gate_table": tables[2], "per": per}
    if streams(x, y) and readable(block.norm2, FP32LayerNorm):
        x, h = gate_residual_norm_modulate(
            x, y, **gate, weight=block.norm2.weight, bias=block.norm2.bias, eps=block.norm2.eps,
            law=laws["attn1+norm2"], out_dtype=x.dtype,
        )  # fmt: skip
    else:
        x = _wan_gate(x, y, gate, laws["attn1"])
        h = block.norm2(x.float()).type_as(x)
    y = block.attn2(h, encoder_hidden_states, None, None)

    if streams(x, y) and readable(block.norm3, FP32LayerNorm):
        x, h = gate_residual_norm_modulate(
            x, y, shift=mods[3], scale=mods[4], shift_table=tables[3], scale_table=tables[4],
            per=per, weight=block.norm3.weight, bias=block.norm3.bias, eps=block.norm3.eps,
            law=laws["attn2+norm3"], out_dtype=x.dtype,
        )  # fmt: skip
    else:
        x = x + y
        h = _wan_norm(block.norm3, x, mods[3:5], tables[3:5], per, laws["norm1"])
    y = block.ffn(h)

    return _wan_gate(x, y, {"gate": mods[5], "gate_table": tables[5], "per": per}, laws["ffn"])


def _wan_sum(mod: Tensor, table: Tensor, per: str) -> Tensor:
    """A modulation as upstream adds it up, broadcast over the tokens."""
    added = table + mod.float()
    return added if per == "token" else added.unsqueeze(1)


def _wan_norm(norm: Any, x: Tensor, mods: Any, tables: Any, per: str, law: int) -> Tensor:
    (shift, scale), (shift_table, scale_table) = mods, tables
    if readable(norm, FP32LayerNorm):
        y = norm_modulate(
            x, shift, scale, shift_table=shift_table, scale_table=scale_table, per=per,
            weight=norm.weight, bias=norm.bias, eps=norm.eps, law=law,
        )  # fmt: skip
        return cast(Tensor, y)
    scale, shift = _wan_sum(scale, scale_table, per), _wan_sum(shift, shift_table, per)
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _wan_gate(x: Tensor, y: Tensor, gate: dict[str, Any], law: int) -> Tensor:
    if streams(x, y):
        return gate_residual(x, y, **gate, law=law)
    summed = _wan_sum(gate["gate"], gate["gate_table"], gate["per"])
    return (x.float() + y.to(torch.promote_types(y.dtype, torch.float32)) * summed).type_as(x)
