"""DiT, PixArt and Latte of diffusers: variants of one block class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel, PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from sora_kernels import accelerate, backend, explain
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
        "sample_size": 8, "norm_num_groups": 2}  # fmt: skip
WIDE = {"dim": 1152, "num_attention_heads": 16, "attention_head_dim": 72, "attention_bias": True,
        "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
        "ff_inner_dim": 128}  # fmt: skip


def dit(**options: Any) -> nn.Module:
    return randomised(DiTTransformer2DModel(**{**TINY, "num_embeds_ada_norm": 20, **options}))


def dit_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8, seed=1).to(dtype),
        "timestep": torch.tensor([3, 15]),
        "class_labels": torch.tensor([1, 5]),
    }


def dit_block() -> nn.Module:
    return randomised(
        BasicTransformerBlock(**WIDE, norm_type="ada_norm_zero", num_embeds_ada_norm=10)
    )


def dit_block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    times, labels = torch.tensor([3, 700]), torch.tensor([1, 5])
    x = randn(2, 32, 1152, seed=3).to(dtype)
    return x, None, None, None, times, None, labels


class TestDiT(FamilyTests):
    case = Case(dit, dit_inputs, dit_block, dit_block_inputs, ("attn1", "ff"), cache=False)


def pixart(**options: Any) -> nn.Module:
    config = {**TINY, "cross_attention_dim": 16, "caption_channels": 12, "out_channels": 4}
    return randomised(PixArtTransformer2DModel(**{**config, **options}))


def pixart_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 12, seed=2).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def single_block(**options: Any) -> nn.Module:
    return randomised(
        BasicTransformerBlock(**WIDE, norm_type="ada_norm_single", norm_eps=1e-6, **options)
    )


def pixart_block() -> nn.Module:
    return single_block(cross_attention_dim=1152)


def pixart_block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    x, text = randn(2, 32, 1152, seed=3).to(dtype), randn(2, 7, 1152, seed=4).to(dtype)
    return x, None, text, None, randn(2, 6 * 1152, seed=5).to(dtype)


class TestPixArt(FamilyTests):
    case = Case(pixart, pixart_inputs, pixart_block, pixart_block_inputs, ("attn1", "attn2", "ff"),
                cache=False)  # fmt: skip


def latte() -> nn.Module:
    shared = {k: v for k, v in TINY.items() if k != "norm_num_groups"}
    config = {**shared, "caption_channels": 12, "out_channels": 4, "patch_size": 4,
              "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 3,
              "cross_attention_dim": 16, "activation_fn": "gelu-approximate"}  # fmt: skip
    return randomised(LatteTransformer3DModel(**config))


def latte_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 3, 8, 8, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 12, seed=2).to(dtype),
        "timestep": torch.tensor([3, 700]),
    }


def latte_block() -> nn.Module:
    """A temporal one; the spatial ones are PixArt's."""
    return single_block()


class TestLatte(FamilyTests):
    # a cache of the first block assumes blocks of one shape; these alternate
    case = Case(latte, latte_inputs, latte_block, pixart_block_inputs, ("attn1", "ff"), cache=False)


def test_chunked_feed_forward_runs_upstreams_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so, once."""
    monkeypatch.setattr(backend, "_decisions", {})
    plain = pixart()
    for block in plain.transformer_blocks:  # type: ignore[union-attr]
        block.set_chunk_feed_forward(4, 1)
    want = run(plain, pixart_inputs(torch.float32))
    accelerate(plain)
    with pytest.warns(UserWarning, match="BasicTransformerBlock runs the upstream path"):
        assert torch.equal(run(plain, pixart_inputs(torch.float32)), want)
    assert "BasicTransformerBlock on cpu: upstream (shapes, dtypes or arguments" in explain()


def test_another_variant_of_the_class_is_left_alone() -> None:
    other = randomised(BasicTransformerBlock(16, 2, 8, norm_type="layer_norm"))
    report = accelerate(other)
    assert not report.fused
    assert [e.reason for e in report.left] == ["an unknown variant of BasicTransformerBlock"]
    with pytest.raises(RuntimeError, match="unknown variant"):
        accelerate(other, strict=True)


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_autocast(family: str) -> None:
    """fp32 weights under bf16 autocast: an fp32 stream, branches and their gates may be bf16."""
    build, given = (dit, dit_inputs) if family == "dit" else (pixart, pixart_inputs)
    model, inputs = build(), given(torch.float32)
    exact = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, inputs)
        accelerate(model, strict=True)
        got = run(model, inputs)
    assert got.dtype == want.dtype
    error = (want - exact).abs().max().item()
    close({"": got.float()}, {"": want.float()}, 1.0 * error / want.abs().max().item())
