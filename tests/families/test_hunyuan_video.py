"""HunyuanVideo of diffusers: blocks of two streams and of one, from text and from an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn


def model(**options: Any) -> nn.Module:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
        "num_layers": 2, "num_single_layers": 0, "num_refiner_layers": 1, "patch_size": 2,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4),
    }  # fmt: skip
    return randomised(HunyuanVideoTransformer3DModel(**{**config, **options}))


def single_model() -> nn.Module:
    return model(num_layers=1, num_single_layers=2)


def replace_model() -> nn.Module:
    return model(image_condition_type="token_replace")


def replace_single_model() -> nn.Module:
    return model(num_layers=1, num_single_layers=2, image_condition_type="token_replace")


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 6, 8, seed=1).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": randn(2, 5, 16, seed=2).to(dtype),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "pooled_projections": randn(2, 8, seed=3).to(dtype),
        "guidance": torch.tensor([6000.0, 6000.0]).to(dtype),
    }


def block() -> nn.Module:
    return randomised(HunyuanVideoTransformerBlock(12, 128, 4.0))


def single_block() -> nn.Module:
    return randomised(HunyuanVideoSingleTransformerBlock(12, 128, 4.0))


def replace_block() -> nn.Module:
    return randomised(HunyuanVideoTokenReplaceTransformerBlock(12, 128, 4.0))


def replace_single_block() -> nn.Module:
    return randomised(HunyuanVideoTokenReplaceSingleTransformerBlock(12, 128, 4.0))


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    rotary = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.empty(1, 16, 3, 8, 8))
    mask = (torch.arange(48 + 7) < 48 + 5)[None, None, None]
    return (
        randn(1, 48, 1536, seed=3).to(dtype),
        randn(1, 7, 1536, seed=4).to(dtype),
        randn(1, 1536, seed=5).to(dtype),
        mask,
        rotary,
    )


def replace_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    return *block_inputs(dtype), randn(1, 1536, seed=6).to(dtype), 16


DOUBLE, SINGLE = ("attn", "ff", "ff_context"), ("attn", "proj_out")
SINGLE_LORA = ("to_q", "to_k", "to_v", "proj_mlp", "proj_out")


class TestHunyuanVideo(FamilyTests):
    case = Case(model, inputs, block, block_inputs, DOUBLE)


class TestHunyuanVideoSingle(FamilyTests):
    case = Case(single_model, inputs, single_block, block_inputs, SINGLE, lora=SINGLE_LORA)


class TestTokenReplace(FamilyTests):
    case = Case(replace_model, inputs, replace_block, replace_inputs, DOUBLE)


class TestTokenReplaceSingle(FamilyTests):
    case = Case(replace_single_model, inputs, replace_single_block, replace_inputs, SINGLE,
                lora=SINGLE_LORA)  # fmt: skip


def test_the_prefix_has_rows_of_its_own() -> None:
    """The first frame's modulation reaches its own tokens and, past the norm, no others."""
    for made in (
        HunyuanVideoTokenReplaceTransformerBlock(2, 12, 2.0),
        HunyuanVideoTokenReplaceSingleTransformerBlock(2, 12, 2.0),
    ):
        accelerate(randomised(made), strict=True)
        x, text, temb = randn(2, 12, 24, seed=1), randn(2, 5, 24, seed=2), randn(2, 24, seed=3)
        given = [x, text, temb, None, None, randn(2, 24, seed=4), 4]
        seen: list[torch.Tensor] = []
        made.attn.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, a, kwargs, seen=seen: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        made(*given)
        given[5] = randn(2, 24, seed=5)
        made(*given)
        assert not torch.isclose(seen[0][:, :4], seen[1][:, :4]).all(-1).any()
        assert torch.equal(seen[0][:, 4:], seen[1][:, 4:])


def test_fused_projections_are_left_alone() -> None:
    fused = model()
    for b in fused.transformer_blocks:  # type: ignore[union-attr]
        b.attn.fuse_projections()  # type: ignore[union-attr]
    want = run(fused, inputs(torch.float32))
    report = accelerate(fused)
    assert {(e.site, e.reason) for e in report.left} == {("attn.qk", "fused projections")}
    close({"": run(fused, inputs(torch.float32))}, {"": want}, 2e-5)
    with pytest.raises(RuntimeError, match="fused projections"):
        accelerate(fused, strict=True)
