"""The plain models that ours is timed against compute the same thing, on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.block import block_flops
from benchmarks.plain_dit import Clip, PlainDiT, from_patches, to_patches, waste
from benchmarks.runner import relative_error
from model.condition import clip_segment
from model.config import DiTConfig
from model.dit import DiT
from sora_kernels.packing import PackedLayout

CONFIG = DiTConfig(width=48, depth=2, heads=2, channels=3, rope_axes=(8, 8, 8), vocabulary=9)
LATENTS = [(1, 4, 6), (2, 4, 4), (1, 4, 6), (3, 2, 2)]
WORDS = 3


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("way", ["plain_padded", "plain_bucketed", "plain_loop", "plain_packed"])
def test_every_plain_way_is_the_model(model: DiT, way: str) -> None:
    torch.manual_seed(1)
    latents = [torch.randn(CONFIG.channels, *latent) for latent in LATENTS]
    words = torch.randint(1, CONFIG.vocabulary, (len(LATENTS), WORDS))
    times = torch.rand(len(LATENTS))
    segments = [clip_segment(WORDS, latent, CONFIG.patch) for latent in LATENTS]
    layout = PackedLayout(segments, patch=CONFIG.patch)
    clips = [Clip(w, x) for w, x in zip(words, latents, strict=True)]

    def gradients(velocities: list[Tensor]) -> list[Tensor]:
        loss = torch.stack([v.square().sum() for v in velocities]).sum()
        weights = list(model.parameters())
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        return [g for g in grads if g is not None]

    ours = model(latents, layout, words.flatten(), times)
    theirs = PlainDiT(model, clips).ways()[way](latents, times)
    assert relative_error(theirs, ours) < 1e-4
    assert relative_error(gradients(theirs), gradients(ours)) < 1e-3


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 3, 1)])
def test_patches_go_there_and_back(patch: tuple[int, int, int]) -> None:
    latent = torch.randn(2, 5, 4, 6, 8)
    tokens = to_patches(latent, patch)
    size = patch[0] * patch[1] * patch[2]
    assert tokens.shape == (2, 4 * 6 * 8 // size, 5 * size)
    assert torch.equal(from_patches(tokens, (4, 6, 8), patch), latent)
    if patch == (1, 2, 2):  # features in the order (c, pt, ph, pw), tokens in raster order
        assert torch.equal(tokens[1, 1, 4:8], latent[1, 1, 0, 0:2, 2:4].flatten())


def test_waste_and_flops_by_hand() -> None:
    assert waste([1, 1, 2]) == pytest.approx(1 / 3)
    # One segment of 2 tokens at width 3: qkv 6*9*2, out 2*9*2, mlp 16*9*2, attention 4*4*3.
    assert block_flops([2], 3) == (6 + 2 + 16) * 9 * 2 + 48
