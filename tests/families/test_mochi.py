"""Mochi of diffusers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiRoPE, MochiTransformerBlock
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sora_kernels import accelerate
from tests.families.common import (
    Case,
    FamilyTests,
    close,
    gradients,
    parameters,
    randomised,
    run,
    tensors,
)
from tests.helpers import randn

SHAPE = (2, 4, 6)  # frames, height, width in tokens


def model() -> nn.Module:
    return randomised(
        MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, num_layers=3,
            pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8,
        )
    )  # fmt: skip


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """The second prompt is shorter; its tokens do not come first."""
    return {
        "hidden_states": randn(2, 4, 2, 8, 6, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 16, seed=2).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool(),
    }


def block(**options: Any) -> nn.Module:
    return randomised(MochiTransformerBlock(1536, 12, 128, 768, **options))


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    frequencies = randn(3, 12, 64, seed=6)
    rope = MochiRoPE()(frequencies, *SHAPE, device="cpu", dtype=torch.float32)
    x, text = randn(1, 48, 1536, seed=3).to(dtype), randn(1, 7, 768, seed=4).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).bool()
    return x, text, randn(1, 1536, seed=5).to(dtype), mask, rope


class TestMochi(FamilyTests):
    # the pooling of the text, which makes the modulation, has a to_q too
    case = Case(model, inputs, block, block_inputs, ("attn1", "ff_context", "ff"),
                lora=("attn1.to_q", "attn1.to_k", "attn1.to_v", "to_out.0"))  # fmt: skip


def last_block() -> nn.Module:
    return block(context_pre_only=True)


def last_block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    """Its text passes through, so that it has a gradient only if it asks for one."""
    x, text, *rest = block_inputs(dtype)
    return x, text.requires_grad_(), *rest


class TestMochiLastBlock:
    """The block without a text branch after the attention."""

    case = Case(model, inputs, last_block, last_block_inputs, ("attn1", "ff"))
    test_law = FamilyTests.test_law
    test_block_at_production_width = FamilyTests.test_block_at_production_width


def test_counts_of_the_last_block() -> None:
    report = accelerate(last_block(), strict=True)
    assert report.families == ["Mochi, last block"]
    assert report.counts() == Counter(norm_modulate=3, gate_residual=2, qk_norm_rope=1)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 3), (4, 0)])
def test_prompts_of_any_length(lengths: tuple[int, int]) -> None:
    """One attention for all samples if they are equally long; the last block drops the text."""
    given = inputs(torch.float32)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    given["encoder_attention_mask"] = mask
    plain = model().requires_grad_(False)
    plain.transformer_blocks.requires_grad_(True)  # type: ignore[union-attr]
    calls, results = [], []
    for patched in (False, True):
        if patched:
            accelerate(plain, strict=True)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            out = run(plain, given)
        found = {e.key: e.count for e in seen.key_averages()}
        calls.append(found["aten::scaled_dot_product_attention"])
        results.append(({"": out}, gradients([out], parameters(plain))))
    pooling = 1  # of the text, for the time embedding
    assert calls == [pooling + 6, pooling + (3 if lengths[0] == lengths[1] else 6)]
    close(results[1][0], results[0][0], 2e-5)
    close(results[1][1], results[0][1], 1e-4)


def test_learning_the_angles_runs_upstreams_rotation() -> None:
    """They are a parameter of the model; frozen, the rotation is ours."""
    learning = model()
    accelerate(learning, strict=True)
    ops = []
    for frozen in (False, True):
        learning.pos_frequencies.requires_grad_(not frozen)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            out = run(learning, inputs(torch.float32))
        ops.append({e.key for e in seen.key_averages() if "qk_norm_rope" in e.key})
        found = gradients([out], parameters(learning))
        assert ("pos_frequencies" in found) is not frozen
    assert not ops[0] and ops[1]


def test_autocast_with_a_wide_stream() -> None:
    """The stream is fp32, branches and gates bf16."""
    wide = block()
    given = block_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = wide(*given)
        accelerate(wide, strict=True)
        got = wide(*given)
    assert [t.dtype for t in got] == [t.dtype for t in want] == [torch.float32] * 2
    close(dict(zip("xt", got, strict=True)), dict(zip("xt", want, strict=True)), 1e-2)


def test_a_gate_wider_than_its_branch_runs_upstreams_code() -> None:
    low = block().to(torch.bfloat16)
    x, text, temb, mask, rope = block_inputs(torch.bfloat16)
    low.norm1.linear.float()  # type: ignore[union-attr, operator]
    low.norm1.silu = Widened()
    want = low(x, text, temb, mask, rope)
    accelerate(low)
    got = low(x, text, temb, mask, rope)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert a.dtype is b.dtype
        close({"": a}, {"": b}, 3e-2)


class Widened(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())
