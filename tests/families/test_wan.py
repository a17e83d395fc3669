"""Wan 2.1 and 2.2 of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, cast, close, randomised, run
from tests.helpers import randn

FP32 = ("scale_shift_table", "norm1", "norm2", "norm3", "rope", "time_embedder")


def model(**options: Any) -> nn.Module:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return randomised(WanTransformer3DModel(**{**config, **options}))


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 8, 6, seed=1).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": randn(2, 5, 16, seed=2).to(dtype),
    }


def block() -> nn.Module:
    return randomised(WanTransformerBlock(1536, 256, 12, cross_attn_norm=True))


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    rotary = WanRotaryPosEmbed(128, (1, 2, 2), 64)(torch.empty(1, 16, 3, 8, 8))
    x, text = randn(1, 48, 1536, seed=3).to(dtype), randn(1, 7, 1536, seed=4).to(dtype)
    return x, text, randn(1, 6, 1536, seed=5).to(dtype), rotary


class TestWan(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn1", "attn2", "ffn"), FP32,
                compile="restored")  # fmt: skip


class TestWanTokens(FamilyTests):
    """Wan 2.2 ti2v: a time for every token."""

    @staticmethod
    def inputs_per_token(dtype: torch.dtype) -> dict[str, Any]:
        times = torch.arange(2 * 24).view(2, 24) * 20 % 1000
        return {**inputs(dtype), "timestep": times}

    @staticmethod
    def block_inputs_per_token(dtype: torch.dtype) -> tuple[Any, ...]:
        x, text, _, rotary = block_inputs(dtype)
        return x, text, randn(1, 48, 6, 1536, seed=6).to(dtype), rotary

    case = Case(model, inputs_per_token, block, block_inputs_per_token,
                ("attn1", "attn2", "ffn"), FP32, compile=False)  # fmt: skip


def test_cast_as_a_whole() -> None:
    """`.to(bfloat16)` takes the tables of the rotation with it: it then rounds in bf16."""
    low = model().to(torch.bfloat16)
    want = run(low, inputs(torch.bfloat16))
    accelerate(low, strict=True)
    got = run(low, inputs(torch.bfloat16))
    assert (got == want).float().mean() >= 0.99


def test_without_a_norm_before_the_cross_attention() -> None:
    plain = model(cross_attn_norm=False)
    want = run(plain, inputs(torch.float32))
    report = accelerate(plain)
    assert {e.site: e.op for e in report.fused if e.module == "blocks.0"} == {
        "norm1": "norm_modulate", "attn1": "gate_residual", "ffn": "gate_residual",
        "attn2+norm3": "gate_residual_norm_modulate", "attn1.qk": "qk_norm_rope",
    }  # fmt: skip
    close({"": run(plain, inputs(torch.float32))}, {"": want}, 2e-5)


def test_image_to_video() -> None:
    """Image keys in the cross-attention are upstream's affair."""
    i2v = model(added_kv_proj_dim=24, image_dim=8)
    given = inputs(torch.float32)
    given["encoder_hidden_states"] = randn(2, 512, 16, seed=2)
    given["encoder_hidden_states_image"] = randn(2, 3, 8, seed=7)
    want = run(i2v, given)
    accelerate(i2v, strict=True)
    close({"": run(i2v, given)}, {"": want}, 2e-5)


def test_fused_projections_are_left_alone() -> None:
    fused = model()
    fused.fuse_qkv_projections()  # type: ignore[operator]
    want = run(fused, inputs(torch.float32))
    report = accelerate(fused)
    assert {(e.site, e.reason) for e in report.left} == {("attn1.qk", "fused projections")}
    close({"": run(fused, inputs(torch.float32))}, {"": want}, 2e-5)
    with pytest.raises(RuntimeError, match="fused projections"):
        accelerate(fused, strict=True)


def test_layerwise_casting() -> None:
    """fp8 storage: norms and tables stay as they are, linear layers are widened by their hooks."""
    low = cast(model(), torch.bfloat16, FP32)
    low.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)  # type: ignore[operator]
    want = run(low, inputs(torch.bfloat16))
    accelerate(low, strict=True)
    assert (run(low, inputs(torch.bfloat16)) == want).float().mean() >= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    mixed = cast(model(), dtype, FP32)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(mixed, inputs(dtype))
        accelerate(mixed, strict=True)
        got = run(mixed, inputs(dtype))
    assert got.dtype == want.dtype and (got == want).float().mean() >= 0.99


def test_inference_mode() -> None:
    plain = model()
    with torch.inference_mode():
        want = run(plain, inputs(torch.float32))
        accelerate(plain)
        close({"": run(plain, inputs(torch.float32))}, {"": want}, 2e-5)
