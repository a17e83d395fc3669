"""LTX-Video of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import (
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformerBlock,
)
from torch import Tensor, nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn


def model(**options: Any) -> nn.Module:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12,
    }  # fmt: skip
    return randomised(LTXVideoTransformer3DModel(**{**config, **options}))


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """The rotation of 16 channels leaves the first 4 as they are."""
    return {
        "hidden_states": randn(2, 24, 4, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 12, seed=2).to(dtype),
        "timestep": torch.tensor([[3], [700]]),
        "encoder_attention_mask": torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def block() -> nn.Module:
    return randomised(LTXVideoTransformerBlock(1536, 24, 64, 1536))


def block_inputs(dtype: torch.dtype, times: int = 1) -> tuple[Any, ...]:
    rope = LTXVideoRotaryPosEmbed(1536)(torch.empty(1, 48, 1536), 3, 4, 4, (8 / 25, 32, 32))
    x, text = randn(1, 48, 1536, seed=3).to(dtype), randn(1, 7, 1536, seed=4).to(dtype)
    return x, text, randn(1, times, 6 * 1536, seed=5).to(dtype), rope


class TestLTX(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn1", "attn2", "ff"))


class TestLTXTokens(FamilyTests):
    """Image to video: a time for every token."""

    @staticmethod
    def inputs_per_token(dtype: torch.dtype) -> dict[str, Any]:
        return {**inputs(dtype), "timestep": torch.arange(48).view(2, 24) * 20}

    @staticmethod
    def block_inputs_per_token(dtype: torch.dtype) -> tuple[Any, ...]:
        return block_inputs(dtype, times=48)

    case = Case(model, inputs_per_token, block, block_inputs_per_token, ("attn1", "attn2", "ff"),
                compile=False)  # fmt: skip


def test_norms_with_a_weight_are_left_alone() -> None:
    weighted = model(norm_elementwise_affine=True)
    given = inputs(torch.float32)
    want = run(weighted, given)
    report = accelerate(weighted)
    assert {(e.site, e.reason) for e in report.left} == {
        ("norm1", "the norm has a weight"), ("attn2+norm2", "the norm has a weight")
    }  # fmt: skip
    close({"": run(weighted, given)}, {"": want}, 2e-5)


def test_a_stream_of_another_dtype_than_the_table_runs_upstreams_code() -> None:
    """Upstream promotes the stream to fp32 then, and so does the block."""
    mixed = block()
    given = [t.bfloat16() if isinstance(t, Tensor) else t for t in block_inputs(torch.float32)]
    for child in ("attn1", "attn2", "ff"):
        mixed.get_submodule(child).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        want = mixed(*given)
        accelerate(mixed)
        got = mixed(*given)
    assert want.dtype is torch.float32
    assert torch.equal(got, want)


def test_autocast_with_a_wide_stream() -> None:
    """The stream and the modulation are fp32, the branches bf16: nothing is rounded between."""
    wide = block()
    given = block_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = wide(*given)
        accelerate(wide)
        got = wide(*given)
    assert got.dtype is want.dtype is torch.float32
    close({"": got}, {"": want}, 1e-2)
