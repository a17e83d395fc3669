"""adaLN of models whose modulation is one per sample: their formulas, and the same by our ops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sora_kernels import RowMap, gate_residual, gate_residual_norm_modulate, norm_modulate
from tests.ops.adaln import Convention, Size, diffusers_rms, layer, one, stream, wide


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


PER_SAMPLE: dict[str, Convention] = {
    "DiT": Convention(dit_shapes, dit_formula, dit_ours),
    "SD3.5": Convention(sd35_shapes, sd35_formula, sd35_ours),
    "Flux": Convention(flux_shapes, flux_formula, flux_ours),
    "CogVideoX": Convention(cog_shapes, cog_formula, cog_ours),
    "Mochi": Convention(mochi_shapes, mochi_formula, mochi_ours, ("tanh", "gated", "residual")),
    "Z-Image": Convention(zimage_shapes, zimage_formula, zimage_ours, "diffusers_rms"),
    "Cosmos": Convention(cosmos_shapes, cosmos_formula, cosmos_ours),
}
