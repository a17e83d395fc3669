"""adaLN with tables, and per frame, segment or token: formulas of the models, and our ops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import RowMap, gate_residual, gate_residual_norm_modulate, norm_modulate
from tests.ops.adaln import Convention, Size, diffusers_rms, layer, one, stream, wide


def pixart_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "cross": stream(z), "mlp": stream(z),
            "t6": (z.b, 6 * z.d), "table": (6, z.d), "t": (z.b, z.d), "last": (2, z.d)}  # fmt: skip


def pixart_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """adaLN-single; the cross-attention joins without gate or norm; the final layer has a table."""
    b = v.x.shape[0]
    s1, c1, g1, s2, c2, g2 = (v.table[None] + v.t6.reshape(b, 6, -1)).chunk(6, 1)
    h1 = layer(v.x) * (1 + c1) + s1
    x1 = v.x + g1 * v.attn
    x2 = x1 + v.cross
    h2 = layer(x2) * (1 + c2) + s2
    x3 = x2 + g2 * v.mlp
    s3, c3 = (v.last[None] + v.t[:, None]).chunk(2, 1)
    return h1, x1, x2, h2, x3, layer(x3) * (1 + c3) + s3


def pixart_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s1, c1, g1, s2, c2, g2 = v.t6.chunk(6, -1)
    ts1, tc1, tg1, ts2, tc2, tg2 = v.table.unbind(0)
    ts3, tc3 = v.last.unbind(0)
    h1 = norm_modulate(v.x, s1, c1, shift_table=ts1, scale_table=tc1, law=law)
    x1 = gate_residual(v.x, v.attn, g1, gate_table=tg1, law=law)
    x2, h2 = gate_residual_norm_modulate(
        x1, v.cross, None, s2, c2, shift_table=ts2, scale_table=tc2, law=law
    )
    x3, out = gate_residual_norm_modulate(
        x2, v.mlp, g2, v.t, v.t, gate_table=tg2, shift_table=ts3, scale_table=tc3, law=law
    )
    return one(h1), x1, x2, h2, x3, out


def opensora_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    frames = (z.b, z.t, z.p, z.d)
    return {"x": frames, "attn": frames, "t": (z.b, 6 * z.d), "t0": (z.b, 6 * z.d),
            "table": (6, z.d)}  # fmt: skip


def opensora_mask(b: int, frames: int) -> Tensor:
    """Frames that are noised; the others are given, at time 0."""
    return (torch.arange(b * frames) % 3 != 0).view(b, frames)


def opensora_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """stdit3 of Open-Sora 1.2: both modulations computed, t_mask_select takes one per frame."""
    b, frames = v.x.shape[:2]
    mask = opensora_mask(b, frames)[:, :, None, None]

    def chunks(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(m[:, None] for m in (v.table[None] + t.reshape(b, 6, -1)).chunk(6, 1))

    (s1, c1, g1, s2, c2, _), (s1_0, c1_0, g1_0, s2_0, c2_0, _) = chunks(v.t), chunks(v.t0)
    normed = layer(v.x)
    h = torch.where(mask, normed * (1 + c1) + s1, normed * (1 + c1_0) + s1_0)
    x1 = v.x + torch.where(mask, g1 * v.attn, g1_0 * v.attn)
    normed = layer(x1)
    return h, x1, torch.where(mask, normed * (1 + c2) + s2, normed * (1 + c2_0) + s2_0)


def opensora_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    b, frames, per_frame, _ = v.x.shape
    row = torch.where(opensora_mask(b, frames), 0, b) + torch.arange(b)[:, None]
    rows = RowMap.from_index(row.flatten().repeat_interleave(per_frame), 2 * b)
    s1, c1, g1, s2, c2, _ = torch.cat((v.t, v.t0)).chunk(6, -1)
    ts1, tc1, tg1, ts2, tc2, _ = v.table.unbind(0)
    h = norm_modulate(v.x, s1, c1, shift_table=ts1, scale_table=tc1, rows=rows, law=law)
    return one(h), *gate_residual_norm_modulate(
        v.x, v.attn, g1, s2, c2, gate_table=tg1, shift_table=ts2, scale_table=tc2, rows=rows,
        law=law,
    )  # fmt: skip


def hunyuan_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "mod": (z.b, 6 * z.d), "first": (z.b, 6 * z.d)}


PREFIX = 3  # tokens of the first frame


def hunyuan_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """Token replace: the first frame's tokens have a modulation of their own."""
    s1, c1, g1, s2, c2, _ = (m.unsqueeze(1) for m in v.mod.chunk(6, -1))
    f1, d1, e1, f2, d2, _ = (m.unsqueeze(1) for m in v.first.chunk(6, -1))

    def modulated(x: Tensor, s: Tensor, c: Tensor, f: Tensor, d: Tensor) -> Tensor:
        normed = layer(x)
        zero = normed[:, :PREFIX] * (1 + d) + f
        return torch.cat((zero, normed[:, PREFIX:] * (1 + c) + s), 1)

    x1 = v.x + torch.cat((v.attn[:, :PREFIX] * e1, v.attn[:, PREFIX:] * g1), 1)
    return modulated(v.x, s1, c1, f1, d1), x1, modulated(x1, s2, c2, f2, d2)


def hunyuan_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    b, tokens = v.x.shape[:2]
    index = (torch.arange(tokens) < PREFIX).long() * b + torch.arange(b)[:, None]
    return _block_by_rows(v, RowMap.from_index(index.flatten(), 2 * b), (v.mod, v.first), law)


def _block_by_rows(
    v: SimpleNamespace, rows: RowMap, mods: tuple[Tensor, ...], law: Any, **norm: Any
) -> tuple[Tensor, ...]:
    s1, c1, g1, s2, c2, _ = torch.cat(mods).chunk(6, -1)
    h = norm_modulate(v.x, s1, c1, rows=rows, law=law, **norm)
    return one(h), *gate_residual_norm_modulate(v.x, v.attn, g1, s2, c2, rows=rows, law=law, **norm)


def flux2_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    mod = (z.b, 6 * z.d)
    return {"x": stream(z), "attn": stream(z), "txt": mod, "ref": mod, "img": mod}


def flux2_cuts(tokens: int) -> list[int]:
    return [2, 3, tokens - 5]


def flux2_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """One modulation for all blocks, blended over the segments text, reference and image."""
    cuts = flux2_cuts(v.x.shape[1])
    mods = [m.unsqueeze(1).expand(-1, n, -1) for m, n in zip((v.txt, v.ref, v.img), cuts,
                                                             strict=True)]  # fmt: skip
    s1, c1, g1, s2, c2, _ = torch.cat(mods, 1).chunk(6, -1)
    x1 = v.x + g1 * v.attn
    return (1 + c1) * layer(v.x) + s1, x1, (1 + c2) * layer(x1) + s2


def flux2_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    b, tokens = v.x.shape[:2]
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(flux2_cuts(tokens)))
    index = segment * b + torch.arange(b)[:, None]
    return _block_by_rows(v, RowMap.from_index(index.flatten(), 3 * b), (v.txt, v.ref, v.img), law)


def qwen_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "mod": (2 * z.b, 6 * z.d)}


def qwen_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """Qwen-Image-Edit: an index of 0 or 1 per token picks between the two halves of the batch."""
    b, tokens = v.x.shape[:2]
    zero = (qwen_index(b, tokens) == 0)[..., None]
    mod = torch.where(zero, v.mod[:b, None], v.mod[b:, None])
    s1, c1, g1, s2, c2, _ = mod.chunk(6, -1)
    x1 = v.x + g1 * v.attn
    return layer(v.x) * (1 + c1) + s1, x1, layer(x1) * (1 + c2) + s2


def qwen_index(b: int, tokens: int) -> Tensor:
    return (torch.arange(b * tokens) // 4 % 2).view(b, tokens)


def qwen_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    b, tokens = v.x.shape[:2]
    index = qwen_index(b, tokens) * b + torch.arange(b)[:, None]
    return _block_by_rows(v, RowMap.from_index(index.flatten(), 2 * b), (v.mod,), law)


def minimax_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    packed = (z.b * z.tokens, z.d)
    return {"x": packed, "attn": packed, "rows": (7, 6 * z.d), "weight": (z.d,)}


def minimax_index(tokens: int) -> Tensor:
    """Times x modalities, in the packed order of the tokens; row 5 has no token."""
    return torch.tensor([0, 3, 1, 6, 2, 4])[torch.arange(tokens) // 2 % 6]


def minimax_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """Packed tokens, index_select of the rows [times * modalities, D], affine RMS."""
    mod = v.rows.index_select(0, minimax_index(v.x.shape[0]))
    s1, c1, g1, s2, c2, _ = mod.chunk(6, -1)

    def rms(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], v.weight, 1e-5)

    x1 = v.x + g1 * v.attn
    return rms(v.x) * (1 + c1) + s1, x1, rms(x1) * (1 + c2) + s2


def minimax_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    rows = RowMap.from_index(minimax_index(v.x.shape[0]), 7)
    return _block_by_rows(v, rows, (v.rows,), law, norm="rms", weight=v.weight, eps=1e-5)


def ltx_shapes(z: Size, per_token: bool) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "cross": stream(z), "mlp": stream(z),
            "temb": (z.b, z.tokens if per_token else 1, 6 * z.d), "table": (6, z.d)}  # fmt: skip


def ltx_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """RMS without weight, a table, T' = 1 or the tokens; no norm before the cross-attention."""
    b, times = v.temb.shape[:2]
    ada = v.table[None, None] + v.temb.reshape(b, times, 6, -1)
    s1, c1, g1, s2, c2, g2 = ada.unbind(2)
    h1 = diffusers_rms(v.x) * (1 + c1) + s1
    x1 = v.x + v.attn * g1
    x2 = x1 + v.cross
    return h1, x1, x2, diffusers_rms(x2) * (1 + c2) + s2, x2 + v.mlp * g2


def ltx_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    # T' times lie evenly over the tokens: 1 of them or one each, `frame` covers both
    s1, c1, g1, s2, c2, g2 = v.temb.chunk(6, -1)
    ts1, tc1, tg1, ts2, tc2, tg2 = v.table.unbind(0)
    how = {"per": "frame", "law": law}
    h1 = norm_modulate(v.x, s1, c1, shift_table=ts1, scale_table=tc1, norm="rms", **how)
    x1 = gate_residual(v.x, v.attn, g1, gate_table=tg1, **how)
    x2, h2 = gate_residual_norm_modulate(
        x1, v.cross, None, s2, c2, shift_table=ts2, scale_table=tc2, norm="rms", **how
    )
    return one(h1), x1, x2, h2, gate_residual(x2, v.mlp, g2, gate_table=tg2, **how)


# --- Wan: fp32 modulation -----------------------------------------------------------------------

WAN_FP32 = ("e", "table", "head", "weight", "bias", "t")


def wan_shapes(z: Size, per_token: bool = False) -> dict[str, tuple[int, ...]]:
    lead = (z.b, z.tokens) if per_token else (z.b,)
    return {"x": stream(z), "attn": stream(z), "cross": stream(z), "mlp": stream(z),
            "e": (*lead, 6 * z.d), "table": (6, z.d), "t": (*lead, z.d), "head": (2, z.d),
            "weight": (z.d,), "bias": (z.d,)}  # fmt: skip


def wan_modulation(v: SimpleNamespace) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    six, two = v.e.unflatten(-1, (6, -1)) + v.table, v.t.unsqueeze(-2) + v.head
    if v.e.dim() == 2:  # per sample
        return tuple(m[:, None] for m in six.unbind(-2)), tuple(m[:, None] for m in two.unbind(-2))
    return six.unbind(-2), two.unbind(-2)


def wan_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """wan/modules/model.py: the stream becomes fp32; autocast rounds at the next projection."""
    (s1, c1, g1, s2, c2, g2), (s3, c3) = wan_modulation(v)
    branch = v.attn.dtype
    h1 = layer(wide(v.x)) * (1 + c1) + s1
    x1 = v.x + v.attn * g1
    h2 = layer(wide(x1), v.weight, v.bias)
    x2 = x1 + v.cross
    h3 = layer(wide(x2)) * (1 + c2) + s2
    x3 = x2 + v.mlp * g2
    out = layer(wide(x3)) * (1 + c3) + s3
    return h1.to(branch), x1, h2.to(branch), x2, h3.to(branch), x3, out.to(branch)


def wan_diffusers_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """transformer_wan.py of diffusers: every step goes back to the stream's dtype."""
    (s1, c1, g1, s2, c2, g2), (s3, c3) = wan_modulation(v)
    dtype = v.x.dtype
    h1 = (layer(wide(v.x)) * (1 + c1) + s1).to(dtype)
    x1 = (wide(v.x) + v.attn * g1).to(dtype)
    h2 = layer(wide(x1), v.weight, v.bias).to(dtype)
    x2 = x1 + v.cross
    h3 = (layer(wide(x2)) * (1 + c2) + s2).to(dtype)
    x3 = (wide(x2) + wide(v.mlp) * g2).to(dtype)
    return h1, x1, h2, x2, h3, x3, (layer(wide(x3)) * (1 + c3) + s3).to(dtype)


def wan_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s1, c1, g1, s2, c2, g2 = v.e.chunk(6, -1)
    ts1, tc1, tg1, ts2, tc2, tg2 = v.table.unbind(0)
    ts3, tc3 = v.head.unbind(0)
    how = {"per": "sample" if v.e.dim() == 2 else "token", "law": law}
    h1 = norm_modulate(v.x, s1, c1, shift_table=ts1, scale_table=tc1, out_dtype=v.attn.dtype, **how)
    x1, h2 = gate_residual_norm_modulate(
        v.x, v.attn, g1, gate_table=tg1, weight=v.weight, bias=v.bias, **how
    )
    x2, h3 = gate_residual_norm_modulate(
        x1, v.cross, None, s2, c2, shift_table=ts2, scale_table=tc2, **how
    )
    x3, out = gate_residual_norm_modulate(
        x2, v.mlp, g2, v.t, v.t, gate_table=tg2, shift_table=ts3, scale_table=tc3, **how
    )
    return one(h1), x1, h2, x2, h3, x3, out


BY_ROWS: dict[str, Convention] = {
    "PixArt": Convention(pixart_shapes, pixart_formula, pixart_ours),
    "Open-Sora 1.2": Convention(opensora_shapes, opensora_formula, opensora_ours),
    "HunyuanVideo I2V": Convention(hunyuan_shapes, hunyuan_formula, hunyuan_ours),
    "Flux.2": Convention(flux2_shapes, flux2_formula, flux2_ours),
    "Qwen-Image-Edit": Convention(qwen_shapes, qwen_formula, qwen_ours),
    "Wan 2.1": Convention(wan_shapes, wan_formula, wan_ours, "fp32_once", fp32=("x", *WAN_FP32)),
    "Wan 2.2": Convention(
        lambda z: wan_shapes(z, True), wan_formula, wan_ours, "fp32_once", fp32=("x", *WAN_FP32)
    ),
    "Wan, diffusers": Convention(
        wan_shapes, wan_diffusers_formula, wan_ours, ("residual",), fp32=WAN_FP32
    ),
    "LTX": Convention(lambda z: ltx_shapes(z, False), ltx_formula, ltx_ours, "diffusers_rms"),
    "LTX, per token": Convention(
        lambda z: ltx_shapes(z, True), ltx_formula, ltx_ours, "diffusers_rms"
    ),
    "MiniMax-H3": Convention(minimax_shapes, minimax_formula, minimax_ours),
}
