"""The DiT with a window: what it sees, that it trains, and that it samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model.condition import Given, clip_segment
from model.config import (
    DITS,
    MODES,
    TRAININGS,
    WORLDS,
    DiTConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from model.data import build_cache, make_batch
from model.dit import DiT
from model.sample import Request, Sampling, sample
from model.text import Vocabulary
from model.train import Trainer
from model.vae import VideoVAE
from model.world import VOCABULARY
from sora_kernels.packing import Grid, PackedLayout

WORDS = Vocabulary(VOCABULARY)
SMALL = DiTConfig(
    16, 2, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(WORDS), base_tokens=48
)
WINDOW = dataclasses.replace(SMALL, window=(1, 3, 3), tile=(1, 1, 2))
TRAIN = TrainConfig("tiny", "tiny", clips=12, tokens=800, steps=3, warmup=2, modes="all")


def alive(config: DiTConfig) -> DiT:
    """A model whose zero-initialised weights are random, in fp64; the same for every window."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DiT(config).double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.15 * noise
    return model


def latents(parts: list) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(p.t, p.h, p.w) for segment in parts for p in segment if isinstance(p, Grid)]
    return [torch.randn(16, *size, generator=generator, dtype=torch.float64) for size in sizes]


@torch.no_grad()
def test_a_window_over_the_clip_is_no_window() -> None:
    known = [Given(torch.zeros(16, 1, 5, 5), 0.0)]
    parts = [
        clip_segment(2, (3, 4, 6), SMALL.patch), clip_segment(2, (3, 5, 5), SMALL.patch, known)
    ]  # fmt: skip
    inputs, words, times = latents(parts), torch.tensor([1, 2, 1, 2]), torch.tensor([0.5, 0.8])
    results = []
    for window in (None, (None, None, None), (1, 3, 3)):
        tile = None if window is None else (1, 1, 2)
        config = dataclasses.replace(SMALL, window=window, tile=tile)
        layout = PackedLayout(parts, **config.layout)
        results.append(alive(config)(inputs, layout, words, times))
    for dense, whole, narrow in zip(*results, strict=True):
        torch.testing.assert_close(dense, whole, rtol=1e-9, atol=1e-9)
        assert (dense - narrow).abs().max() > 1e-3


@torch.no_grad()
def test_far_patches_are_not_seen() -> None:
    parts: list = [[Grid(1, 1, 24)]]  # no words, which would pass everything on
    inputs = latents(parts)
    changed = [inputs[0].clone()]
    changed[0][..., -1] += 1.0
    words, times = torch.zeros(0, dtype=torch.long), torch.tensor([0.5])
    model, layout = alive(WINDOW), PackedLayout(parts, **WINDOW.layout)
    before, after = (model(x, layout, words, times)[0] for x in (inputs, changed))
    moved = (before - after).abs().amax((0, 1, 2)) > 0
    # Twelve tiles of two patches. The last one is seen by tiles 10 and 11, these by 9 to 11.
    assert moved.nonzero()[:, 0].tolist() == list(range(18, 24))


def test_it_trains_and_samples() -> None:
    config = dataclasses.replace(SMALL, window=(3, 3, 3), tile=(1, 1, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        cache = build_cache(
            VideoVAE().encode, WORLDS["tiny"], MODES["all"], TRAIN.clips, 0, WORDS, 48
        )
    trainer = Trainer(DiT(config), TRAIN, cache)
    assert make_batch(cache, trainer.packs[0], config, TRAIN, 0).layout.order == "tile"
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for _ in range(TRAIN.steps):
        trainer.advance()
    after = list(trainer.model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) / 2
    first = torch.randn(config.channels, 1, 4, 6)
    requests = [Request((1, 2), (3, 4, 6)), Request((1,), (3, 4, 6), given=[Given(first, 0.0)])]
    made = sample(trainer.model, requests, Sampling(steps=2))
    for latent in made:
        assert latent.shape == (config.channels, 3, 4, 6)
        assert torch.isfinite(latent).all()


def test_configs() -> None:
    assert DITS[TRAININGS["tiny-window"].dit].window == (3, 3, 3)
    for config in (SMALL, WINDOW, DITS["tiny-window"]):
        assert from_dict(DiTConfig, to_dict(config)) == config
    assert DITS["tiny"].layout == {"patch": (1, 1, 1)}
    with pytest.raises(ValueError, match=r"window\[1\]: expected an odd number"):
        dataclasses.replace(SMALL, window=(1, 2, 1))
    with pytest.raises(ValueError, match="tile: expected None without a window"):
        dataclasses.replace(SMALL, tile=(1, 2, 2))
