"""Native sizes against square crops: what training on cropped clips does to framing.

Sora's report shows that a model trained on square crops makes videos with the subject cut off.
Both arms train on the same scenes of five sizes, one as they are, one on their centre squares, for
equal time. The judge asks for the square and for the native sizes whether the whole object is in
view in every frame. True clips always show it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.config import TrainConfig, WorldConfig
from model.data import LatentCache
from model.dit import DiT
from model.stack import Stack
from model.studies.looking import Ask, Validation, answers, asks, attributes, framed
from model.studies.making import encoded, new_dit
from model.studies.runs import Arm, Row
from model.text import Vocabulary
from model.train import Trainer
from model.vae import VideoVAE
from model.world import VOCABULARY

SQUARE = (32, 32)
OTHERS = ((32, 48), (48, 32), (32, 64), (64, 32))
WORLD = WorldConfig(sizes=tuple((size, 0.2) for size in (SQUARE, *OTHERS)), small=0.0)
CONFIG = TrainConfig(
    "tiny", "native", clips=6144, tokens=768, steps=10**6, learning_rate=1.5e-3, muon=0.015,
    shift=2.0, ema=0.995, detailed=0.0,
)  # fmt: skip
LABELS = {"native": "native sizes", "cropped": "square crops"}


def centre_square(videos: Tensor) -> Tensor:
    """[..., H, W] cropped to the square in its middle."""
    height, width = videos.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return videos[..., top : top + side, left : left + side]


def caches(vae: VideoVAE, arm: str, seed: int, clips: int) -> LatentCache:
    """Clips of the study's world, encoded whole or cropped."""

    def encode(videos: Tensor) -> Tensor:
        return vae.encode(centre_square(videos) if arm == "cropped" else videos)

    return encoded(encode, WORLD, seed, clips)


def trainer(arm: str, cache: Callable[[str, int], LatentCache], seed: int) -> Trainer:
    """A fresh trainer of an arm."""
    model = new_dit(CONFIG.dit)
    return Trainer(model, replace(CONFIG, seed=seed), cache(arm, seed))


def ceilings(vae: VideoVAE, rows: dict[str, list[Ask]]) -> Row:
    """What true clips and their round trips through the VAE score."""
    found = {}
    for name, wanted in rows.items():
        with torch.no_grad():
            trips = [vae.decode(vae.encode(ask.video[None]))[0] for ask in wanted]
        clips = {"true": [ask.video for ask in wanted], "vae": trips}
        found[name] = {where: {**framed(wanted, part), **attributes(wanted, part)}
                       for where, part in clips.items()}  # fmt: skip
    return found


def questions(clips: int) -> dict[str, list[Ask]]:
    """What is asked at the square and at the other sizes."""
    return {"square": asks(WORLD, [SQUARE], 9, clips), "native": asks(WORLD, OTHERS, 9, clips)}


def arms(
    vae: VideoVAE, cache: Callable[[str, int], LatentCache], minutes: float, clips: int
) -> list[Arm]:
    """The two arms. cache: the encoded clips of an arm and a seed."""
    vocabulary, wanted = Vocabulary(VOCABULARY), questions(clips)
    seen = Validation(caches(vae, "native", 1000, max(16, 2 * clips)), CONFIG.tokens, 12)

    def look(model: DiT) -> Row:
        stack, row = Stack(model, vae, vocabulary), {"loss": seen(model)}
        for where, part in wanted.items():
            made = answers(stack, part)
            measured = {**framed(part, made), **attributes(part, made)}
            row |= {f"{where}_{name}": value for name, value in measured.items()}
        return row

    budgets = (60 * minutes / 2, 60 * minutes)
    return [
        Arm(name, label, partial(trainer, name, cache), look, budgets)
        for name, label in LABELS.items()
    ]


def picture(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Framing and accuracy of both arms at the square and at the native sizes."""
    from model.studies.plots import bars, figure, save

    fig, axes = figure(3)
    for place, (name, title) in zip(axes, [
        ("square_framed", "whole object in view at 32x32 (%)"),
        ("native_framed", "whole object in view at other sizes (%)"),
        ("native_all", "every attribute right at other sizes (%)"),
    ], strict=True):  # fmt: skip
        bars(place, {LABELS[arm]: [100 * run[-1][name] for run in runs]
                     for arm, runs in results.items()}, title)  # fmt: skip
    save(fig, path)
