"""Stable Diffusion 3 and 3.5 of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, blocks, close, randomised, run
from tests.helpers import randn


def model(**options: Any) -> nn.Module:
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 12, "num_attention_heads": 2, "joint_attention_dim": 16,
        "caption_projection_dim": 24, "pooled_projection_dim": 8, "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }  # fmt: skip
    return randomised(SD3Transformer2DModel(**{**config, **options}))


def dual_model() -> nn.Module:
    """SD3.5-medium: the image attends to itself once more in the first blocks."""
    return model(dual_attention_layers=(0,))


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 6, 8, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 16, seed=2).to(dtype),
        "pooled_projections": randn(2, 8, seed=3).to(dtype),
        "timestep": torch.tensor([3, 700]),
    }


def block() -> nn.Module:
    return randomised(JointTransformerBlock(1536, 24, 64, qk_norm="rms_norm"))


def dual_block() -> nn.Module:
    made = JointTransformerBlock(1536, 24, 64, qk_norm="rms_norm", use_dual_attention=True)
    return randomised(made)


def last_block() -> nn.Module:
    made = JointTransformerBlock(1536, 24, 64, context_pre_only=True, qk_norm="rms_norm")
    return randomised(made)


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        randn(1, 48, 1536, seed=3).to(dtype),
        randn(1, 7, 1536, seed=4).to(dtype),
        randn(1, 1536, seed=5).to(dtype),
    )


class TestSD3(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn", "ff_context", "ff"), cache=False,
                compile=False)  # fmt: skip


class TestSD35(FamilyTests):
    case = Case(dual_model, inputs, dual_block, block_inputs, ("attn", "attn2", "ff_context", "ff"),
                cache=False)  # fmt: skip


def test_law_of_the_last_block() -> None:
    class Last(FamilyTests):
        case = Case(model, inputs, last_block, block_inputs, ("attn", "ff"))

    Last().test_law()


def test_without_norms_of_q_and_k() -> None:
    """SD3.0: upstream's processor stays, and no site is missing for it."""
    bare = model(qk_norm=None)
    want = run(bare, inputs(torch.float32))
    report = accelerate(bare, strict=True)
    assert "qk_norm_rope" not in report.counts()
    assert report.counts().total() == 2 * 6 + 4
    close({"": run(bare, inputs(torch.float32))}, {"": want}, 2e-5)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunked_feed_forward(dim: int) -> None:
    chunked = model()
    chunked.enable_forward_chunking(1, dim)  # type: ignore[operator]
    want = run(chunked, inputs(torch.float32))
    calls: list[int] = []
    for b in blocks(chunked):
        b.ff.register_forward_hook(lambda _, a, y: calls.append(y.shape[dim]))  # type: ignore[union-attr]
    accelerate(chunked, strict=True)
    close({"": run(chunked, inputs(torch.float32))}, {"": want}, 2e-5)
    assert set(calls) == {1} and len(calls) == 3 * (2 if dim == 0 else 12)


def test_dual_attention_in_the_last_block_is_an_unknown_variant() -> None:
    odd = model(dual_attention_layers=(0, 1, 2))
    want = run(odd, inputs(torch.float32))
    report = accelerate(odd)
    assert [(e.module, e.reason) for e in report.left] == [
        ("transformer_blocks.2", "an unknown variant of JointTransformerBlock")
    ]
    close({"": run(odd, inputs(torch.float32))}, {"": want}, 2e-5)


def test_autocast() -> None:
    mixed = dual_model()
    with torch.autocast("cpu", torch.bfloat16):
        want = run(mixed, inputs(torch.float32))
        accelerate(mixed, strict=True)
        got = run(mixed, inputs(torch.float32))
    assert torch.equal(got, want)
