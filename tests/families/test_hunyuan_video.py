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
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, gradients, parameters, randomised, run
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
    return (
        randn(1, 48, 1536, seed=3).to(dtype),
        randn(1, 7, 1536, seed=4).to(dtype),
        randn(1, 1536, seed=5).to(dtype),
        None,
        rotary,
    )


def replace_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    return *block_inputs(dtype), randn(1, 1536, seed=6).to(dtype), 16


class Masks(TorchFunctionMode):
    """Records the number of keys, and if there is a mask, at every attention."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            self.seen.append((key.shape[-2], kwargs.get("attn_mask") is not None))
        return func(*args, **kwargs)


DOUBLE, SINGLE = ("attn", "ff", "ff_context"), ("attn", "proj_out")
SINGLE_LORA = ("to_q", "to_k", "to_v", "proj_mlp", "proj_out")


class TestHunyuanVideo(FamilyTests):
    case = Case(model, inputs, block, block_inputs, DOUBLE, compile=False)


class TestHunyuanVideoSingle(FamilyTests):
    case = Case(single_model, inputs, single_block, block_inputs, SINGLE, lora=SINGLE_LORA)


class TestTokenReplace(FamilyTests):
    case = Case(replace_model, inputs, replace_block, replace_inputs, DOUBLE, compile=False)


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


@pytest.mark.parametrize("lengths", [(14, 14), (17, 13), (17, 17)])
def test_padding_of_the_text_is_cut_off(lengths: tuple[int, ...]) -> None:
    """No mask reaches the attention, and what upstream's mask gives comes out."""
    made = randomised(HunyuanVideoTransformerBlock(2, 12, 2.0))
    mask = (torch.arange(17) < torch.tensor(lengths)[:, None])[:, None, None]
    x, text, temb = randn(2, 12, 24, seed=1), randn(2, 5, 24, seed=2), randn(2, 24, seed=3)
    want = made(x, text, temb, mask)
    expected = gradients(list(want), parameters(made))
    accelerate(made, strict=True)
    with Masks() as masks:
        got = made(x, text, temb, mask)
    keys = [lengths[0]] if len(set(lengths)) == 1 else list(lengths)
    assert masks.seen == [(n, False) for n in keys]
    close(dict(zip("xy", got, strict=True)), dict(zip("xy", want, strict=True)), 2e-5)
    close(gradients(list(got), parameters(made)), expected, 1e-4)
    mask[0, ..., 10:] = False  # written to in place: the lengths are read again
    with Masks() as masks:
        made(x, text, temb, mask)
    assert (10, False) in masks.seen


def test_other_masks_stay() -> None:
    made = randomised(HunyuanVideoTransformerBlock(2, 12, 2.0))
    x, text, temb = randn(2, 12, 24, seed=1), randn(2, 5, 24, seed=2), randn(2, 24, seed=3)
    hole = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    hole[:, ..., 3] = False
    added = torch.zeros(2, 1, 1, 17).masked_fill(~hole, -1e4)
    with torch.no_grad():
        wanted = [made(x, text, temb, mask) for mask in (hole, added)]
        accelerate(made, strict=True)
        for mask, want in zip((hole, added), wanted, strict=True):
            with Masks() as masks:
                got = made(x, text, temb, mask)
            assert masks.seen == [(17, True)]
            close(dict(zip("xy", got, strict=True)), dict(zip("xy", want, strict=True)), 2e-5)


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
