"""Flux of diffusers: blocks of two streams and of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxIPAdapterAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn

GRID, TEXT = (4, 6), 5


def positions(height: int, width: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.zeros(height, width, 3)
    image[..., 1] += torch.arange(height)[:, None]
    image[..., 2] += torch.arange(width)
    return image.view(-1, 3), torch.zeros(text, 3)


def model(**options: Any) -> nn.Module:
    config = {
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 0,
        "attention_head_dim": 12, "num_attention_heads": 2, "joint_attention_dim": 16,
        "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return randomised(FluxTransformer2DModel(**{**config, **options}))


def single_model() -> nn.Module:
    return model(num_layers=1, num_single_layers=2)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    image, text = positions(*GRID, TEXT)
    return {
        "hidden_states": randn(2, len(image), 4, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=2).to(dtype),
        "pooled_projections": randn(2, 8, seed=3).to(dtype),
        "timestep": torch.tensor([0.3, 0.7]).to(dtype),
        "img_ids": image,
        "txt_ids": text,
    }


def block() -> nn.Module:
    return randomised(FluxTransformerBlock(1536, 12, 128))


def single_block() -> nn.Module:
    return randomised(FluxSingleTransformerBlock(1536, 12, 128))


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    image, text = positions(6, 8, 7)
    rotary = FluxPosEmbed(10000, [16, 56, 56])(torch.cat((text, image)))
    return (
        randn(1, 48, 1536, seed=3).to(dtype),
        randn(1, 7, 1536, seed=4).to(dtype),
        randn(1, 1536, seed=5).to(dtype),
        rotary,
    )


class TestFlux(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn", "ff", "ff_context"), compile=False)


class TestFluxSingle(FamilyTests):
    case = Case(single_model, inputs, single_block, block_inputs, ("attn", "proj_out"),
                lora=("to_q", "to_k", "to_v", "proj_mlp", "proj_out"))  # fmt: skip


def test_fused_projections_are_left_alone() -> None:
    fused = single_model()
    fused.fuse_qkv_projections()  # type: ignore[operator]
    want = run(fused, inputs(torch.float32))
    report = accelerate(fused)
    assert {(e.site, e.reason) for e in report.left} == {("attn.qk", "fused projections")}
    close({"": run(fused, inputs(torch.float32))}, {"": want}, 2e-5)
    with pytest.raises(RuntimeError, match="fused projections"):
        accelerate(fused, strict=True)


def test_ip_adapter() -> None:
    """Its processor is left alone; what it adds joins where upstream adds it."""
    adapted = model()
    for b in adapted.transformer_blocks:  # type: ignore[union-attr]
        b.attn.processor = FluxIPAdapterAttnProcessor(24, 24, scale=0.5)  # type: ignore[union-attr]
    randomised(adapted)
    given = inputs(torch.float32)
    given["joint_attention_kwargs"] = {"ip_hidden_states": [randn(2, 3, 24, seed=9)]}
    want = run(adapted, given)
    report = accelerate(adapted)
    assert [e.reason for e in report.left] == ["the processor is FluxIPAdapterAttnProcessor"] * 2
    close({"": run(adapted, given)}, {"": want}, 2e-5)


def test_fp16_is_clipped_as_upstream_does() -> None:
    """Text streams grow past the range of fp16; upstream clips them behind every block."""
    large = block().half()
    large.ff_context.net[2].bias.data.fill_(60000)  # type: ignore[union-attr]
    given = block_inputs(torch.float16)
    with torch.no_grad():
        want, _ = large(*given)
        accelerate(large, strict=True)
        got, _ = large(*given)
    assert (want.abs() == 65504).any() and got.isfinite().all()
    assert (got == want).float().mean() >= 0.999


def test_autocast() -> None:
    """Under autocast the modulation is half beside an fp32 stream: upstream's promotion stays."""
    mixed = single_model()
    with torch.autocast("cpu", torch.bfloat16):
        want = run(mixed, inputs(torch.float32))
        accelerate(mixed, strict=True)
        got = run(mixed, inputs(torch.float32))
    assert torch.equal(got, want)
