"""Blocks of diffusers as the published models have them: what the dropin suite measures.

Widths, heads and feed-forwards are those of the named checkpoints. The numbers of tokens are much
smaller, so that a call on a CPU takes a fraction of a second: what lies between the linear layers
grows with the tokens as they do, so its share of a call is the same, except that the weights are
read for fewer tokens. Text is shortened in proportion, but for PixArt, whose 256 pixel model has
these very shapes. Masked texts have the lengths of an empty prompt and of a long one, as guidance
makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GRID = (2, 6, 8)  # frames, height and width of a small video, in tokens
TOKENS = GRID[0] * GRID[1] * GRID[2]


@dataclass(frozen=True)
class Family:
    """A block of upstream and what it is called with.

    Attributes:
        name: of the family.
        case: the checkpoint and the size of this call.
        width: of the residual stream.
        tokens, text: of all samples together; ``text`` is that of the stream or of the keys.
        block: makes it, with upstream's initial weights.
        arguments: of one call, for a dtype.
        fp32: parts of parameter names that upstream keeps in fp32.
        samples: of the batch.
        streams: how many of the first arguments are residual streams; the second is the text's.
        joined: whether linear layers see both streams as one.
    """

    name: str
    case: str
    width: int
    tokens: int
    text: int
    block: Callable[[], nn.Module]
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    fp32: tuple[str, ...] = ()
    samples: int = 1
    streams: int = 1
    joined: bool = False


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def bias(lengths: tuple[int, ...], longest: int, dtype: torch.dtype) -> Tensor:
    """A mask of texts as models of diffusers hand it to their blocks: ``[B, 1, L]``, added."""
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return ((1 - valid.to(dtype)) * -10000.0).unsqueeze(1)


def wan() -> Family:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    grid, tokens, text = (4, 8, 8), 256, 64

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = WanRotaryPosEmbed(128, (1, 1, 1), 64)(torch.empty(1, 16, *grid))
        x, given = randn(1, tokens, 1536, dtype=dtype), randn(1, text, 1536, dtype=dtype)
        return x, given, randn(1, 6, 1536, dtype=torch.float32), rotary

    return Family(
        "Wan", f"Wan 2.1 1.3B, {tokens} tokens", 1536, tokens, text,
        lambda: WanTransformerBlock(1536, 8960, 12, cross_attn_norm=True), arguments,
        ("scale_shift_table", "norm1", "norm2", "norm3"),
    )  # fmt: skip


def wan_per_token() -> Family:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = WanRotaryPosEmbed(128, (1, 1, 1), 64)(torch.empty(1, 16, *GRID))
        x, given = randn(1, TOKENS, 3072, dtype=dtype), randn(1, 32, 3072, dtype=dtype)
        return x, given, randn(1, TOKENS, 6, 3072, dtype=torch.float32), rotary

    return Family(
        "Wan", f"Wan 2.2 TI2V 5B, {TOKENS} tokens, a time for each", 3072, TOKENS, 32,
        lambda: WanTransformerBlock(3072, 14336, 24, cross_attn_norm=True), arguments,
        ("scale_shift_table", "norm1", "norm2", "norm3"),
    )  # fmt: skip


def hunyuan(single: bool) -> Family:
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoRotaryPosEmbed,
        HunyuanVideoSingleTransformerBlock,
        HunyuanVideoTransformerBlock,
    )

    text, valid = 32, 12

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = HunyuanVideoRotaryPosEmbed(1, 1, [16, 56, 56])(torch.empty(1, 16, *GRID))
        x, given = randn(1, TOKENS, 3072, dtype=dtype), randn(1, text, 3072, dtype=dtype)
        mask = (torch.arange(TOKENS + text) < TOKENS + valid).view(1, 1, 1, -1)
        return x, given, randn(1, 3072, dtype=dtype), mask, rotary

    kind = HunyuanVideoSingleTransformerBlock if single else HunyuanVideoTransformerBlock
    return Family(
        "HunyuanVideo",
        f"HunyuanVideo{' single' * single}, {TOKENS}+{text} tokens, {valid} of text valid",
        3072, TOKENS, text, lambda: kind(24, 128, 4.0), arguments,
        streams=2, joined=single,
    )  # fmt: skip


def hunyuan_double() -> Family:
    return hunyuan(single=False)


def hunyuan_single() -> Family:
    return hunyuan(single=True)


def cogvideox() -> Family:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    text = 32

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        t, h, w = GRID
        rotary = get_3d_rotary_pos_embed(64, ((0, 0), (h, w)), (h, w), t)
        x, given = randn(1, TOKENS, 3072, dtype=dtype), randn(1, text, 3072, dtype=dtype)
        return x, given, randn(1, 512, dtype=dtype), rotary

    return Family(
        "CogVideoX", f"CogVideoX 5B, {TOKENS}+{text} tokens", 3072, TOKENS, text,
        lambda: CogVideoXBlock(3072, 48, 64, 512), arguments, streams=2, joined=True,
    )  # fmt: skip


def ltx() -> Family:
    from diffusers.models.transformers.transformer_ltx import (
        LTXVideoRotaryPosEmbed,
        LTXVideoTransformerBlock,
    )

    lengths, text = (30, 60), 128

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = LTXVideoRotaryPosEmbed(2048)(torch.empty(2, TOKENS, 2048), *GRID, (8 / 25, 32, 32))
        x, given = randn(2, TOKENS, 2048, dtype=dtype), randn(2, text, 2048, dtype=dtype)
        return x, given, randn(2, 1, 6 * 2048, dtype=dtype), rotary, bias(lengths, text, dtype)

    return Family(
        "LTX-Video", f"LTX-Video 2B, 2x{TOKENS} tokens, {lengths[0]} and {lengths[1]} of {text} of "
        "text valid", 2048, 2 * TOKENS, 2 * text,
        lambda: LTXVideoTransformerBlock(2048, 32, 64, 2048), arguments, samples=2,
    )  # fmt: skip


def mochi() -> Family:
    from diffusers.models.transformers.transformer_mochi import MochiRoPE, MochiTransformerBlock

    grid, lengths, text = (1, 6, 8), (1, 24), 32
    tokens = grid[1] * grid[2]

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = MochiRoPE()(torch.randn(3, 24, 64), *grid, device="cpu", dtype=torch.float32)
        x, given = randn(2, tokens, 3072, dtype=dtype), randn(2, text, 1536, dtype=dtype)
        mask = torch.arange(text) < torch.tensor(lengths)[:, None]
        return x, given, randn(2, 3072, dtype=dtype), mask, rotary

    return Family(
        "Mochi", f"Mochi 1, 2x{tokens} tokens, {lengths[0]} and {lengths[1]} of {text} of text "
        "valid", 3072, 2 * tokens, 2 * text,
        lambda: MochiTransformerBlock(3072, 24, 128, 1536), arguments, samples=2, streams=2,
    )  # fmt: skip


def latte() -> Family:
    frames, tokens, text = 2, 256, 32

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x = randn(frames, tokens, 1152, dtype=dtype)
        given = randn(frames, text, 1152, dtype=dtype)
        return x, None, given, None, randn(frames, 6 * 1152, dtype=dtype)

    return Family(
        "Latte", f"Latte spatial, {frames}x{tokens} tokens", 1152, frames * tokens, frames * text,
        lambda: basic("ada_norm_single", cross_attention_dim=1152), arguments, samples=frames,
    )  # fmt: skip


def latte_temporal() -> Family:
    frames, places = 16, 32

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x = randn(places, frames, 1152, dtype=dtype)
        return x, None, None, None, randn(places, 6 * 1152, dtype=dtype)

    return Family(
        "Latte", f"Latte temporal, {places}x{frames} tokens", 1152, frames * places, 0,
        lambda: basic("ada_norm_single"), arguments, samples=places,
    )  # fmt: skip


def allegro() -> Family:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
    from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock

    lengths, text = (6, 18), 48

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        frames, height, width = GRID
        made: Any = get_3d_rotary_pos_embed_allegro(
            96, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
        )
        *tables, t, h, w = made
        places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
        rotary = tuple(tables), tuple(places.contiguous())
        x, given = randn(2, TOKENS, 2304, dtype=dtype), randn(2, text, 2304, dtype=dtype)
        mod = randn(2, 6 * 2304, dtype=dtype)
        return x, given, mod, None, bias(lengths, text, dtype), rotary

    return Family(
        "Allegro", f"Allegro, 2x{TOKENS} tokens, {lengths[0]} and {lengths[1]} of {text} of text "
        "valid", 2304, 2 * TOKENS, 2 * text,
        lambda: AllegroTransformerBlock(
            2304, 24, 96, cross_attention_dim=2304, activation_fn="gelu-approximate",
            attention_bias=True, norm_elementwise_affine=False, norm_eps=1e-6,
        ), arguments, samples=2,
    )  # fmt: skip


def cosmos() -> Family:
    from diffusers.models.transformers.transformer_cosmos import (
        CosmosRotaryPosEmbed,
        CosmosTransformerBlock,
    )

    text = 32

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = CosmosRotaryPosEmbed(128)(torch.empty(1, 16, 2, 12, 16), fps=30)
        x, given = randn(1, TOKENS, 4096, dtype=dtype), randn(1, text, 1024, dtype=dtype)
        return x, given, randn(1, 4096, dtype=dtype), randn(1, 3 * 4096, dtype=dtype), rotary

    return Family(
        "Cosmos", f"Cosmos 1.0 7B, {TOKENS} tokens", 4096, TOKENS, text,
        lambda: CosmosTransformerBlock(32, 128, 1024, adaln_lora_dim=256), arguments,
    )  # fmt: skip


def flux(single: bool) -> Family:
    from diffusers.models.transformers.transformer_flux import (
        FluxPosEmbed,
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )

    side, text = 10, 32

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rows = torch.arange(float(side))
        at = torch.stack(torch.meshgrid(torch.zeros(1), rows, rows, indexing="ij"), -1).view(-1, 3)
        rotary = FluxPosEmbed(10000, [16, 56, 56])(torch.cat((torch.zeros(text, 3), at)))
        x, given = randn(1, side * side, 3072, dtype=dtype), randn(1, text, 3072, dtype=dtype)
        return x, given, randn(1, 3072, dtype=dtype), rotary

    kind = FluxSingleTransformerBlock if single else FluxTransformerBlock
    return Family(
        "Flux", f"Flux.1{' single' * single}, {side * side}+{text} tokens", 3072, side * side, text,
        lambda: kind(3072, 24, 128), arguments, streams=2, joined=single,
    )  # fmt: skip


def flux_double() -> Family:
    return flux(single=False)


def flux_single() -> Family:
    return flux(single=True)


def sd3() -> Family:
    from diffusers.models.attention import JointTransformerBlock

    tokens, text = 256, 64

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x, given = randn(1, tokens, 1536, dtype=dtype), randn(1, text, 1536, dtype=dtype)
        return x, given, randn(1, 1536, dtype=dtype)

    return Family(
        "SD3", f"SD3.5 medium, dual attention, {tokens}+{text} tokens", 1536, tokens, text,
        lambda: JointTransformerBlock(1536, 24, 64, qk_norm="rms_norm", use_dual_attention=True),
        arguments, streams=2,
    )  # fmt: skip


def basic(kind: str, **options: Any) -> nn.Module:
    """The class that DiT, PixArt and Latte share, at the width of DiT-XL."""
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(
        1152, 16, 72, norm_type=kind, attention_bias=True, activation_fn="gelu-approximate",
        norm_elementwise_affine=False, norm_eps=1e-6, **options,
    )  # fmt: skip


def pixart() -> Family:
    lengths, tokens, text = (2, 60), 256, 120

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x, given = randn(2, tokens, 1152, dtype=dtype), randn(2, text, 1152, dtype=dtype)
        return x, None, given, bias(lengths, text, dtype), randn(2, 6 * 1152, dtype=dtype)

    return Family(
        "PixArt", f"PixArt 256, 2x{tokens} tokens, {lengths[0]} and {lengths[1]} of {text} of text "
        "valid", 1152, 2 * tokens, 2 * text,
        lambda: basic("ada_norm_single", cross_attention_dim=1152), arguments, samples=2,
    )  # fmt: skip


def dit() -> Family:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x = randn(2, 256, 1152, dtype=dtype)
        return x, None, None, None, torch.tensor([3, 700]), None, torch.tensor([1, 5])

    return Family(
        "DiT", "DiT-XL/2 256, 2x256 tokens", 1152, 512, 0,
        lambda: basic("ada_norm_zero", num_embeds_ada_norm=1000), arguments, samples=2,
    )  # fmt: skip


FAMILIES: tuple[Callable[[], Family], ...] = (
    wan, wan_per_token, hunyuan_double, hunyuan_single, cogvideox, ltx, mochi, latte,
    latte_temporal, allegro, cosmos, flux_double, flux_single, sd3, pixart, dit,
)  # fmt: skip
