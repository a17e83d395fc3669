"""The named sizes are DiT's: every difference to the paper's figures is accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.budget import TIME_FEATURES, macs, parameters, training_flops
from model.condition import KINDS
from model.config import DITS, DiTConfig
from model.dit import DiT
from sora_kernels import use_backend
from sora_kernels.packing import Grid, PackedLayout, Text

# Peebles & Xie 2022, table 4: 256x256 pixels are 32x32x4 latents, patch 2; parameters in millions,
# "Gflops" (multiply-accumulates).
PAPER = {"S": (33, 6.06), "B": (130, 23.01), "L": (458, 80.71), "XL": (675, 118.64)}
CLASSES, TOKENS = 1000, 256


def papers(name: str) -> DiTConfig:
    """Our model of that size on the paper's latents."""
    return replace(DITS[name], channels=4, patch=(1, 2, 2), vocabulary=1, max_words=1)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_paper(name):
    config = papers(name)
    ours, d = parameters(config), config.width
    theirs = sum(ours.values())
    theirs -= ours["words"] + ours["kinds of parts"] + ours["query and key norms"]  # not there
    theirs += (CLASSES + 1) * d  # labels; the table of positions is fixed and not counted
    theirs += 16 * d + 16  # the head predicts a variance beside every value
    assert round(theirs / 1e6) == PAPER[name][0]


@pytest.mark.parametrize("name", PAPER)
def test_multiply_accumulates_of_the_paper(name):
    config = papers(name)
    theirs = sum(macs(config, [[Grid(1, 16, 16)]]).values())
    theirs += TOKENS * config.width * 16  # the variance
    theirs += (2 * config.depth + 1) * TOKENS * config.width  # one for every normed element
    assert round(theirs / 1e9, 2) == PAPER[name][1]


@pytest.mark.parametrize("name", sorted(DITS))
def test_parameters_are_the_models(name):
    config = replace(DITS[name], vocabulary=37)
    with torch.device("meta"):
        model = DiT(config)
    assert sum(parameters(config).values()) == sum(p.numel() for p in model.parameters())


def test_multiply_accumulates_are_the_models():
    torch.manual_seed(0)
    config = DiTConfig(48, 2, 2, channels=3, rope_axes=(8, 8, 8), vocabulary=5, max_words=8)
    segments = [
        [Text(4), Grid(1, 2, 3, given=True), Grid(2, 2, 3, origin=(1.0, 0.0, 0.0))],
        [Text(1), Grid(3, 4, 2)],
    ]
    layout = PackedLayout(segments, patch=config.patch)
    latents = [
        torch.randn(3, part.t, 2 * part.h, 2 * part.w)
        for segment in segments for part in segment if isinstance(part, Grid)
    ]  # fmt: skip
    model = DiT(config).eval()
    with FlopCounterMode(display=False) as counter, use_backend("reference"), torch.no_grad():
        model(latents, layout, torch.arange(5) % 5, torch.tensor([0.3, 0.8]))
    assert counter.get_total_flops() == 2 * sum(macs(config, segments).values())
    assert training_flops(config, segments) == 3 * counter.get_total_flops()


def test_time_features_and_kinds_are_the_models():
    from model import dit

    assert TIME_FEATURES == dit.TIME_FEATURES and KINDS == dit.KINDS
