"""The adaLN of the large diffusion transformers, each in its own words, against the fused ops.

One case per convention: the model's formula in plain PyTorch as its published code computes it,
and the same from our ops. In fp32 against the formula in fp64, outputs and all gradients; in bf16
the outputs are held to the formula's own rounding, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import (
    RowMap,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    use_backend,
)
from tests.helpers import check, poisoned, randn, ulp

FP32 = ("shift", "scale")  # of diffusers' Wan and upstream's: what follows the statistics is fp32


@dataclass(frozen=True)
class Size:
    """B samples of T frames of P tokens, D wide."""

    b: int
    t: int
    p: int
    d: int

    @property
    def tokens(self) -> int:
        return self.t * self.p


Shapes = Callable[[Size], dict[str, tuple[int, ...]]]
Formula = Callable[[SimpleNamespace], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Convention:
    """``shapes`` of the inputs, the model's ``formula`` and ``ours``, its rounding ``law``.

    Inputs named in ``fp32`` stay fp32 when the model runs in bf16.
    """

    shapes: Shapes
    formula: Formula
    ours: Callable[..., tuple[Tensor, ...]]
    law: str | Iterable[str] = "torch"
    fp32: tuple[str, ...] = field(default=())


def wide(x: Tensor) -> Tensor:
    """``x.float()`` of the model codes; fp64 stays itself, it is the oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
          eps: float = 1e-6) -> Tensor:  # fmt: skip
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def diffusers_rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm of diffusers: back to the model's dtype before the weight."""
    xhat = (wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return xhat if weight is None else xhat * weight


def stream(z: Size) -> tuple[int, ...]:
    return (z.b, z.tokens, z.d)


def one(x: Any) -> Tensor:
    assert isinstance(x, Tensor)
    return x


# --- per sample ---------------------------------------------------------------------------------


def dit_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "mlp": stream(z), "mod": (z.b, 6 * z.d),
            "last": (z.b, 2 * z.d)}  # fmt: skip


def dit_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """DiTBlock and FinalLayer of facebookresearch/DiT."""
    s1, c1, g1, s2, c2, g2 = (m.unsqueeze(1) for m in v.mod.chunk(6, -1))
    s3, c3 = (m.unsqueeze(1) for m in v.last.chunk(2, -1))
    h1 = layer(v.x) * (1 + c1) + s1
    x1 = v.x + g1 * v.attn
    h2 = layer(x1) * (1 + c2) + s2
    x2 = x1 + g2 * v.mlp
    return h1, x1, h2, x2, layer(x2) * (1 + c3) + s3


def dit_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s1, c1, g1, s2, c2, g2 = v.mod.chunk(6, -1)
    h1 = norm_modulate(v.x, s1, c1, law=law)
    x1, h2 = gate_residual_norm_modulate(v.x, v.attn, g1, s2, c2, law=law)
    return one(h1), x1, h2, *gate_residual_norm_modulate(
        x1, v.mlp, g2, *v.last.chunk(2, -1), law=law
    )  # fmt: skip


def sd35_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "attn2": stream(z), "mod": (z.b, 9 * z.d)}


def sd35_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """SD35AdaLayerNormZeroX: two inputs of attention from one norm, then both gated outputs."""
    s1, c1, g1, s2, c2, _, s3, c3, g3 = (m.unsqueeze(1) for m in v.mod.chunk(9, -1))
    normed = layer(v.x)
    x1 = v.x + g1 * v.attn
    x1 = x1 + g3 * v.attn2
    return normed * (1 + c1) + s1, normed * (1 + c3) + s3, x1, layer(x1) * (1 + c2) + s2


def sd35_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s1, c1, g1, s2, c2, _, s3, c3, g3 = v.mod.chunk(9, -1)
    h, h2 = norm_modulate(v.x, s1, c1, shift2=s3, scale2=c3, law=law)
    return h, h2, *gate_residual_norm_modulate(
        v.x, v.attn, g1, s2, c2, y2=v.attn2, gate2=g3, law=law
    )  # fmt: skip


def flux_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "out": stream(z), "mod": (z.b, 3 * z.d), "last": (z.b, 2 * z.d)}


def flux_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """The single block's S, C, G, and AdaLayerNormContinuous with the scale first."""
    s, c, g = (m.unsqueeze(1) for m in v.mod.chunk(3, -1))
    scale, shift = (m.unsqueeze(1) for m in v.last.chunk(2, -1))
    x1 = v.x + g * v.out
    return layer(v.x) * (1 + c) + s, x1, layer(x1) * (1 + scale) + shift


def flux_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s, c, g = v.mod.chunk(3, -1)
    scale, shift = v.last.chunk(2, -1)
    h = one(norm_modulate(v.x, s, c, law=law))
    return h, *gate_residual_norm_modulate(v.x, v.out, g, shift, scale, law=law)


def cog_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    text = (z.b, 5, z.d)
    return {"x": stream(z), "text": text, "attn": stream(z), "attn_text": text, "weight": (z.d,),
            "bias": (z.d,), "mod": (z.b, 6 * z.d)}  # fmt: skip


def cog_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """CogVideoXLayerNormZero: one affine norm and six chunks for video and text."""
    s, c, g, s_text, c_text, g_text = (m[:, None] for m in v.mod.chunk(6, -1))
    h = layer(v.x, v.weight, v.bias, 1e-5) * (1 + c) + s
    h_text = layer(v.text, v.weight, v.bias, 1e-5) * (1 + c_text) + s_text
    return h, h_text, v.x + g * v.attn, v.text + g_text * v.attn_text


def cog_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s, c, g, s_text, c_text, g_text = v.mod.chunk(6, -1)
    affine = {"weight": v.weight, "bias": v.bias, "eps": 1e-5, "law": law}
    return (
        one(norm_modulate(v.x, s, c, **affine)),
        one(norm_modulate(v.text, s_text, c_text, **affine)),
        gate_residual(v.x, v.attn, g, law=law),
        gate_residual(v.text, v.attn_text, g_text, law=law),
    )


def mochi_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "mlp": stream(z), "mod": (z.b, 4 * z.d)}


def mochi_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """C, G, C, G; RMS without weight in fp32; the branch is normed and gated by a tanh."""

    def rms(x: Tensor, scale: Tensor) -> Tensor:
        x_ = wide(x)
        return (x_ * torch.rsqrt(x_.pow(2).mean(-1, keepdim=True) + 1e-6) * scale).to(x.dtype)

    c1, g1, c2, g2 = (m.unsqueeze(1) for m in v.mod.chunk(4, -1))
    h1 = rms(v.x, 1 + wide(c1))
    x1 = v.x + rms(v.attn, torch.tanh(g1))
    return h1, x1, rms(x1, 1 + wide(c2)), x1 + rms(v.mlp, torch.tanh(g2))


def mochi_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    c1, g1, c2, g2 = v.mod.chunk(4, -1)
    x1 = gate_residual(v.x, v.attn, g1, tanh=True, norm="rms", law=law)
    return (
        one(norm_modulate(v.x, None, c1, norm="rms", law=law)),
        x1,
        one(norm_modulate(x1, None, c2, norm="rms", law=law)),
        gate_residual(x1, v.mlp, g2, tanh=True, norm="rms", law=law),
    )


def zimage_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "before": (z.d,), "after": (z.d,),
            "mod": (z.b, 2, 2 * z.d)}  # fmt: skip


def zimage_select(b: int, tokens: int) -> Tensor:
    """Which of the two rows of its sample, noisy (1) or clean (0), each token takes."""
    return (torch.arange(tokens) % 3 > 0).long().expand(b, tokens)


def zimage_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """Sandwich: affine RMS before and after the branch, C and G, noisy or clean per token."""
    noisy = zimage_select(*v.x.shape[:2])[..., None] == 1
    mod = torch.where(noisy, v.mod[:, 1, None], v.mod[:, 0, None])
    scale, gate = mod.chunk(2, -1)
    scale, gate = 1.0 + scale, gate.tanh()
    h = diffusers_rms(v.x, v.before, 1e-5) * scale
    return h, v.x + gate * diffusers_rms(v.attn, v.after, 1e-5)


def zimage_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    b, tokens = v.x.shape[:2]
    index = zimage_select(b, tokens) + 2 * torch.arange(b)[:, None]
    rows = RowMap.from_index(index.flatten(), 2 * b)
    scale, gate = v.mod.flatten(0, 1).chunk(2, -1)
    norm = {"norm": "rms", "eps": 1e-5, "rows": rows, "law": law}
    return (
        one(norm_modulate(v.x, None, scale, weight=v.before, **norm)),
        gate_residual(v.x, v.attn, gate, tanh=True, weight=v.after, **norm),
    )


def cosmos_shapes(z: Size) -> dict[str, tuple[int, ...]]:
    return {"x": stream(z), "attn": stream(z), "lora": (z.b, 3 * z.d), "temb": (z.b, 3 * z.d)}


def cosmos_formula(v: SimpleNamespace) -> tuple[Tensor, ...]:
    """The block's low-rank projection plus the embedding that all blocks share."""
    s, c, g = (m.unsqueeze(1) for m in (v.lora + v.temb).chunk(3, -1))
    return layer(v.x) * (1 + c) + s, v.x + g * v.attn


def cosmos_ours(v: SimpleNamespace, law: Any) -> tuple[Tensor, ...]:
    s, c, g = (v.lora + v.temb).chunk(3, -1)
    return one(norm_modulate(v.x, s, c, law=law)), gate_residual(v.x, v.attn, g, law=law)


# --- tables, frames, segments, tokens -----------------------------------------------------------


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


CONVENTIONS = {
    "DiT": Convention(dit_shapes, dit_formula, dit_ours),
    "PixArt": Convention(pixart_shapes, pixart_formula, pixart_ours),
    "Open-Sora 1.2": Convention(opensora_shapes, opensora_formula, opensora_ours),
    "SD3.5": Convention(sd35_shapes, sd35_formula, sd35_ours),
    "Flux": Convention(flux_shapes, flux_formula, flux_ours),
    "HunyuanVideo I2V": Convention(hunyuan_shapes, hunyuan_formula, hunyuan_ours),
    "Flux.2": Convention(flux2_shapes, flux2_formula, flux2_ours),
    "Qwen-Image-Edit": Convention(qwen_shapes, qwen_formula, qwen_ours),
    "Wan 2.1": Convention(
        wan_shapes, wan_formula, wan_ours, "fp32_once", fp32=("x", *WAN_FP32)
    ),
    "Wan 2.2": Convention(
        lambda z: wan_shapes(z, True), wan_formula, wan_ours, "fp32_once", fp32=("x", *WAN_FP32)
    ),
    "Wan, diffusers": Convention(
        wan_shapes, wan_diffusers_formula, wan_ours, ("residual",), fp32=WAN_FP32
    ),
    "CogVideoX": Convention(cog_shapes, cog_formula, cog_ours),
    "Mochi": Convention(
        mochi_shapes, mochi_formula, mochi_ours, ("tanh", "gated", "residual")
    ),
    "Z-Image": Convention(zimage_shapes, zimage_formula, zimage_ours, "diffusers_rms"),
    "LTX": Convention(
        lambda z: ltx_shapes(z, False), ltx_formula, ltx_ours, "diffusers_rms"
    ),
    "LTX, per token": Convention(
        lambda z: ltx_shapes(z, True), ltx_formula, ltx_ours, "diffusers_rms"
    ),
    "Cosmos": Convention(cosmos_shapes, cosmos_formula, cosmos_ours),
    "MiniMax-H3": Convention(minimax_shapes, minimax_formula, minimax_ours),
}  # fmt: skip

Tensors = dict[str, Tensor]


def inputs(case: Convention, size: Size, dtype: torch.dtype) -> Tensors:
    """Random leaves; values that bf16 holds, so that every dtype starts from the same numbers."""
    leaves = {}
    for seed, (name, shape) in enumerate(case.shapes(size).items()):
        kept = torch.float32 if dtype is torch.bfloat16 and name in case.fp32 else dtype
        value = randn(*shape, dtype=torch.bfloat16, seed=seed).to(kept)
        leaves[name] = value.requires_grad_()
    return leaves


def run(compute: Callable[..., tuple[Tensor, ...]], leaves: Tensors, *law: Any) -> list[Tensor]:
    """Outputs, then the gradients of all leaves for random upstream gradients."""
    outputs = compute(SimpleNamespace(**leaves), *law)
    upstream = [randn(*o.shape, dtype=o.dtype, seed=90 + i) for i, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


def exact(case: Convention, leaves: Tensors, dtypes: list[torch.dtype]) -> list[Tensor]:
    """The formula in fp64, fed the upstream gradients that outputs of ``dtypes`` get."""
    double = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    outputs = case.formula(SimpleNamespace(**double))
    upstream = [
        randn(*o.shape, dtype=dtype, seed=90 + i).double()
        for i, (o, dtype) in enumerate(zip(outputs, dtypes, strict=True))
    ]
    return [*outputs, *torch.autograd.grad(outputs, list(double.values()), upstream)]


def assert_close(case: Convention, size: Size, backend: str) -> None:
    leaves = inputs(case, size, torch.float32)
    with use_backend(backend), poisoned():
        got = run(case.ours, leaves, case.law)
    count = len(got) - len(leaves)
    want = exact(case, leaves, [torch.float32] * count)
    names = [f"output {i}" for i in range(count)] + [f"d{name}" for name in leaves]
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape and g.dtype == torch.float32, name
        worst = (g - w).abs().max().item() / w.abs().max().item()
        assert worst < 2e-6, f"{name}: relative error {worst:.1e}"


@pytest.mark.parametrize("name", CONVENTIONS)
def test_formula_in_fp32(name: str) -> None:
    assert_close(CONVENTIONS[name], Size(2, 3, 8, 96), "native")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_formula_in_fp32_triton(name: str) -> None:
    assert_close(CONVENTIONS[name], Size(1, 2, 3, 16), "triton")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_rounding_in_bf16(name: str) -> None:
    case = CONVENTIONS[name]
    leaves = inputs(case, Size(2, 4, 24, 256), torch.bfloat16)
    eager = run(case.formula, leaves)
    count = len(eager) - len(leaves)
    with use_backend("native"):
        got = run(case.ours, leaves, case.law)
        once = case.ours(SimpleNamespace(**leaves), "fp32_once")
    want = exact(case, leaves, [o.dtype for o in eager[:count]])
    largest = max(x.abs().max().item() for x in (*eager[:count], *leaves.values()))
    shares = []
    for i in range(count):
        assert got[i].dtype == eager[i].dtype, f"output {i}"
        if got[i].dtype is torch.float32:  # of an fp32 stream: nothing is rounded to bf16
            torch.testing.assert_close(got[i], eager[i], rtol=1e-6, atol=1e-6)
            continue
        same = (got[i] == eager[i]).float().mean().item()
        assert same >= 0.999, f"output {i}: {same:.3%} bit-equal"
        worst = (got[i].double() - eager[i].double()).abs().max().item()
        assert worst <= ulp(torch.tensor(largest), torch.bfloat16).item(), f"output {i}"
        shares.append((once[i] == eager[i]).float().mean().item())
    if case.law != "fp32_once":
        assert min(shares) < 0.98, f"the law makes no difference: {shares}"
    for leaf, g, w, low in zip(leaves, got[count:], want[count:], eager[count:], strict=True):
        assert g.dtype == low.dtype, leaf
        check(g, w, low, grad=True, name=f"d{leaf}")
