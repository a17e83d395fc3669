"""Allegro of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn


def model() -> nn.Module:
    return randomised(
        AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
            num_layers=2, cross_attention_dim=48, sample_width=6, sample_height=8,
            sample_frames=3, caption_channels=12,
        )
    )  # fmt: skip


def rotary(width: int, frames: int, height: int, columns: int) -> Any:
    """As the pipeline prepares it: a table for each axis and the rows that tokens take of it."""
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        width, ((0, 0), (height, columns)), (height, columns), frames, (2.2, 2.0, 2.0)
    )
    grid = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(tables), tuple(grid.T.reshape(3, 1, -1).contiguous())


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 3, 8, 6, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 12, seed=2).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]),
        "image_rotary_emb": rotary(24, 3, 4, 3),
    }


def block() -> nn.Module:
    return randomised(
        AllegroTransformerBlock(
            1152, 12, 96, cross_attention_dim=1152, activation_fn="gelu-approximate",
            attention_bias=True, norm_elementwise_affine=False, norm_eps=1e-6,
        )
    )  # fmt: skip


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    x, text = randn(1, 48, 1152, seed=3).to(dtype), randn(1, 7, 1152, seed=4).to(dtype)
    return x, text, randn(1, 6 * 1152, seed=5).to(dtype), None, None, rotary(96, 3, 4, 4)


class TestAllegro(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn1", "attn2", "ff"), cache=False)


def test_a_mask_of_the_video() -> None:
    masked = model()
    given = inputs(torch.float32)
    mask = torch.ones(2, 3, 8, 6)
    mask[1, :, :, 4:] = 0
    given["attention_mask"] = mask
    want = run(masked, given)
    accelerate(masked, strict=True)
    close({"": run(masked, given)}, {"": want}, 2e-5)


def test_without_a_rotation() -> None:
    plain = model()
    given = {**inputs(torch.float32), "image_rotary_emb": None}
    want = run(plain, given)
    accelerate(plain, strict=True)
    close({"": run(plain, given)}, {"": want}, 2e-5)


def test_autocast() -> None:
    """fp32 weights: the stream and the modulation are fp32, branches bf16."""
    wide = block()
    given = block_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = wide(*given)
        accelerate(wide, strict=True)
        got = wide(*given)
    assert got.dtype is want.dtype is torch.float32
    close({"": got}, {"": want}, 1e-2)
