"""Cosmos of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers.transformer_cosmos import (
    CosmosRotaryPosEmbed,
    CosmosTransformerBlock,
)
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run, tensors
from tests.helpers import randn


def model(**options: Any) -> nn.Module:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4,
        "max_size": (4, 16, 16), "concat_padding_mask": False,
        "extra_pos_embed_type": None,
    }  # fmt: skip
    return randomised(CosmosTransformer3DModel(**{**config, **options}))


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 8, 6, seed=1).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": randn(2, 5, 12, seed=2).to(dtype),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
        "fps": 30,
    }


def block(**options: Any) -> nn.Module:
    return randomised(CosmosTransformerBlock(12, 128, 1024, adaln_lora_dim=256, **options))


def block_inputs(dtype: torch.dtype, times: tuple[int, ...] = ()) -> tuple[Any, ...]:
    rope = CosmosRotaryPosEmbed(128)(torch.empty(1, 16, 3, 8, 8), fps=30)
    x, text = randn(1, 48, 1536, seed=3).to(dtype), randn(1, 7, 1024, seed=4).to(dtype)
    emb, temb = randn(1, *times, 1536, seed=5).to(dtype), randn(1, *times, 4608, seed=6).to(dtype)
    return x, text, emb, temb, rope


class TestCosmos(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn1", "attn2", "ff"), cache=False)


class TestCosmosTokens(FamilyTests):
    """Video to world: a time for every token."""

    @staticmethod
    def inputs_per_frame(dtype: torch.dtype) -> dict[str, Any]:
        times = torch.tensor([3, 300, 500, 700]).view(2, 1, 2, 1, 1)
        return {**inputs(dtype), "timestep": times}

    @staticmethod
    def block_inputs_per_token(dtype: torch.dtype) -> tuple[Any, ...]:
        return block_inputs(dtype, (48,))

    case = Case(model, inputs_per_frame, block, block_inputs_per_token,
                ("attn1", "attn2", "ff"), cache=False, compile=False)  # fmt: skip


def test_learned_positions_and_control() -> None:
    """Positions are added inside every block, residuals of a ControlNet after it."""
    controlled = model(extra_pos_embed_type="learnable", controlnet_block_every_n=1)
    given = inputs(torch.float32)
    given["block_controlnet_hidden_states"] = [randn(2, 24, 32, seed=i) for i in (7, 8)]
    want = run(controlled, given)
    accelerate(controlled, strict=True)
    close({"": run(controlled, given)}, {"": want}, 2e-5)


def test_a_block_of_a_controlnet() -> None:
    control = block(before_proj=True, after_proj=True)
    given, latents = block_inputs(torch.float32), randn(1, 48, 1536, seed=9)
    want = tensors(control(*given, latents=latents))
    accelerate(control, strict=True)
    got = tensors(control(*given, latents=latents))
    assert len(got) == len(want) == 2
    close(dict(enumerate(got)), dict(enumerate(want)), 2e-5)  # type: ignore[arg-type]


def test_image_context() -> None:
    """Keys of an image in the cross-attention are upstream's affair."""
    with_image = model(img_context_dim_in=8, img_context_dim_out=32, text_embed_dim=32)
    given = inputs(torch.float32)
    given["encoder_hidden_states"] = (randn(2, 5, 32, seed=2), randn(2, 3, 8, seed=7))
    given["attention_mask"] = None
    mask = torch.ones(2, 1, 1, 5).bool()
    for module in with_image.modules():
        if isinstance(module, CosmosTransformerBlock):
            module.register_forward_pre_hook(lambda _, args: (*args[:6], (mask, None), *args[7:]))
    want = run(with_image, given)
    assert not accelerate(with_image).left
    close({"": run(with_image, given)}, {"": want}, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Modulations and branches are bf16 under autocast, whatever the stream is."""
    wide = block()
    given = block_inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = wide(*given)
        accelerate(wide, strict=True)
        got = wide(*given)
    assert got.dtype is want.dtype
    close({"": got}, {"": want}, 1e-2)


def test_projections_without_a_low_rank_part() -> None:
    """norm1.linear_1 is an identity then."""
    plain = block()
    for norm in (plain.norm1, plain.norm2, plain.norm3):
        norm.linear_1 = nn.Identity()  # type: ignore[union-attr]
        norm.linear_2 = nn.Linear(1536, 4608, bias=False)  # type: ignore[union-attr]
    want = plain(*block_inputs(torch.float32))
    accelerate(plain, strict=True)
    close({"": plain(*block_inputs(torch.float32))}, {"": want}, 2e-5)
