"""CogVideoX of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn

from sora_kernels import accelerate
from tests.families.common import Case, FamilyTests, close, randomised, run
from tests.helpers import randn

WIDTH = 16  # of a head; 4 + 6 + 6 for t, h and w


def model(**options: Any) -> nn.Module:
    config = {
        "num_attention_heads": 2, "attention_head_dim": WIDTH, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 8,
        "sample_height": 6, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 5,
        "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return randomised(CogVideoXTransformer3DModel(**{**config, **options}))


def rotary(width: int, frames: int, height: int, columns: int) -> Any:
    crop = ((0, 0), (height, columns))
    return get_3d_rotary_pos_embed(width, crop, (height, columns), frames)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 3, 4, 6, 8, seed=1).to(dtype),
        "encoder_hidden_states": randn(2, 5, 16, seed=2).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "image_rotary_emb": rotary(WIDTH, 3, 3, 4),
    }


def block() -> nn.Module:
    return randomised(CogVideoXBlock(1920, 30, 64, 512))


def block_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    x, text = randn(1, 48, 1920, seed=3).to(dtype), randn(1, 7, 1920, seed=4).to(dtype)
    return x, text, randn(1, 512, seed=5).to(dtype), rotary(64, 2, 4, 6)


class TestCogVideoX(FamilyTests):
    case = Case(model, inputs, block, block_inputs, ("attn1", "ff"))


def test_without_a_rotation() -> None:
    """CogVideoX-2B adds its positions to the input; q and k are normed all the same."""
    plain = model(use_rotary_positional_embeddings=False)
    given = {**inputs(torch.float32), "image_rotary_emb": None}
    want = run(plain, given)
    accelerate(plain, strict=True)
    close({"": run(plain, given)}, {"": want}, 2e-5)


def test_fused_projections_are_left_alone() -> None:
    fused = model()
    fused.fuse_qkv_projections()  # type: ignore[operator]
    want = run(fused, inputs(torch.float32))
    report = accelerate(fused)
    assert {e.reason for e in report.left} == {"the processor is FusedCogVideoXAttnProcessor2_0"}
    close({"": run(fused, inputs(torch.float32))}, {"": want}, 2e-5)


def test_without_norms_of_q_and_k() -> None:
    bare = CogVideoXBlock(32, 2, 16, 8, qk_norm=False)
    report = accelerate(bare)
    assert {e.site for e in report.left} == {"attn1.qk"}
    given = randn(2, 12, 32, seed=1), randn(2, 5, 32, seed=2), randn(2, 8, seed=3)
    want = CogVideoXBlock.forward(bare, *given)
    close(dict(enumerate(bare(*given))), dict(enumerate(want)), 2e-5)  # type: ignore[arg-type]
