"""Packed against padded, bucketed and clip by clip: clips per second, and quality at equal time.

All ways train the same small model on the same clips of many sizes. `packed` is this project's
model. The plain ways are idiomatic eager PyTorch on the same weights (`benchmarks.plain_dit`), and
all but `bucketed` take the same clips in every step and so walk the same path, each at its own
pace; `bucketed` does what bucketing does in practice, a step of clips of one size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain_dit import Clip, PlainDiT
from model.config import TrainConfig, WorldConfig
from model.data import Batch, LatentCache
from model.dit import DiT
from model.stack import Stack
from model.studies.looking import Validation, answers, asks, attributes
from model.studies.making import encoded, new_dit
from model.studies.runs import Arm, Row
from model.text import NO_PROMPT, Vocabulary
from model.train import Trainer, packed_velocity
from model.vae import VideoVAE
from model.world import VOCABULARY

WORDS = 7  # of "a red circle and a green square"; shorter captions are filled up to them
WORLD = WorldConfig(
    sizes=(((32, 32), 0.5), ((32, 48), 0.15), ((48, 32), 0.15), ((48, 48), 0.2)),
    frames=((1, 0.2), (5, 0.15), (9, 0.4), (17, 0.25)),
    small=0.0,
)
CONFIG = TrainConfig(
    "tiny", "packing", clips=6144, tokens=768, steps=10**6, learning_rate=1.5e-3, muon=0.015,
    shift=2.0, ema=0.995, no_prompt=0.0, detailed=0.0,
)  # fmt: skip
NO_PROMPTS = 0.1
LABELS = {
    "packed": "packed (sora_kernels)",
    "plain_packed": "packed, plain PyTorch",
    "bucketed": "bucketed, plain",
    "loop": "clip by clip, plain",
    "padded": "padded, plain",
}


class Buckets:
    """Packs of clips of one size that hold `budget` tokens; pack i is a pure function of i."""

    def __init__(self, cache: LatentCache, tokens: np.ndarray, budget: int, seed: int) -> None:
        self.tokens, self.budget, self.seed = tokens, budget, seed
        self.sizes = [tuple(shape) for shape in cache.shapes.tolist()]
        self._epochs: dict[int, list[list[int]]] = {}

    def __getitem__(self, number: int) -> list[int]:
        epoch = 0
        while number >= len(packs := self._epoch(epoch)):
            number, epoch = number - len(packs), epoch + 1
        return packs[number]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, 3, epoch])
            buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for clip in rng.permutation(len(self.sizes)).tolist():
                buckets[self.sizes[clip]].append(clip)
            packs = []
            for clips in buckets.values():
                room = max(1, self.budget // int(self.tokens[clips[0]]))
                packs += [clips[at : at + room] for at in range(0, len(clips), room)]
            self._epochs[epoch] = [packs[k] for k in rng.permutation(len(packs))]
        return self._epochs[epoch]


def equal_captions(cache: LatentCache, share: float, seed: int) -> LatentCache:
    """The cache with captions of WORDS words each; a `share` of them says nothing.

    Plain ways want equal lengths, or masks on top; all ways get the same captions.
    """
    silent = np.random.default_rng([seed, 4]).random(len(cache)) < share
    words = []
    for clip in range(len(cache)):
        caption = [] if silent[clip] else cache.caption(clip, False)
        if len(caption) > WORDS:
            raise ValueError(
                f"cache: expected captions of at most {WORDS} words, got {len(caption)}"
            )
        words += 2 * (caption + [NO_PROMPT] * (WORDS - len(caption)))
    tensors = {name: getattr(cache, name) for name in cache.NAMES}
    tensors["words"] = torch.tensor(words, dtype=torch.int32)
    tensors["word_counts"] = torch.full((len(cache), 2), WORDS)
    return LatentCache(**tensors)


def plain_velocity(way: str) -> Callable[[DiT, Batch], list[Tensor]]:
    """A batch through the model's weights in a plain way; rotary tables are made once a size."""
    turns: dict[tuple[int, int, int], Tensor] = {}

    def velocity(model: DiT, batch: Batch) -> list[Tensor]:
        words = batch.words.view(-1, WORDS)
        clips = [Clip(row, x) for row, x in zip(words, batch.inputs, strict=True)]
        plain = PlainDiT(model, clips, turns=turns)
        return plain.ways()[way](batch.inputs, batch.times)

    return velocity


def caches(vae: VideoVAE, seed: int, clips: int) -> LatentCache:
    """Clips of the study's world, encoded."""
    return equal_captions(encoded(vae.encode, WORLD, seed, clips), NO_PROMPTS, seed)


def trainer(way: str, cache: Callable[[int], LatentCache], seed: int) -> Trainer:
    """A fresh trainer that batches in `way`."""
    given = cache(seed)
    model = new_dit(CONFIG.dit)
    packs = None
    if way == "bucketed":
        packs = Buckets(given, given.tokens(model.config.patch), CONFIG.tokens, seed)
    velocity = packed_velocity if way == "packed" else plain_velocity(_WAYS[way])
    return Trainer(model, replace(CONFIG, seed=seed), given, packs=packs, velocity=velocity)


_WAYS = {
    "plain_packed": "plain_packed",
    "bucketed": "plain_bucketed",
    "loop": "plain_loop",
    "padded": "plain_padded",
}


def arms(
    vae: VideoVAE, cache: Callable[[int], LatentCache], minutes: float, clips: int
) -> list[Arm]:
    """The five ways. cache: the encoded clips of a seed. clips: made and read at every look."""
    vocabulary = Vocabulary(VOCABULARY)
    wanted = asks(WORLD, [size for size, _ in WORLD.sizes], 9, clips)
    seen = Validation(caches(vae, 1000, max(16, 2 * clips)), CONFIG.tokens, 12)

    def look(model: DiT) -> Row:
        made = answers(Stack(model, vae, vocabulary), wanted, [NO_PROMPT] * WORDS)
        return {"loss": seen(model), **attributes(wanted, made)}

    budgets = tuple(60 * minutes * k / 4 for k in (1, 2, 3, 4))
    return [
        Arm(way, label, partial(trainer, way, cache), look, budgets)
        for way, label in LABELS.items()
    ]


def picture(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Clips per second; loss and accuracy over time, mean and range of the seeds."""
    from model.studies.plots import band, bars, figure, save

    fig, (left, middle, right) = figure(3)
    rates = {LABELS[way]: [run[-1]["clips"] / run[-1]["seconds"] for run in runs]
             for way, runs in results.items()}  # fmt: skip
    bars(left, rates, "clips trained per CPU second")
    for way, runs in results.items():
        minutes = [row["budget"] / 60 for row in runs[0]]
        band(middle, minutes, [[row["loss"] for row in run] for run in runs], LABELS[way])
        band(right, minutes, [[100 * row["all"] for row in run] for run in runs], LABELS[way])
    middle.set(xlabel="CPU minutes of training", ylabel="validation loss")
    right.set(xlabel="CPU minutes of training", ylabel="every attribute right (%)")
    middle.legend(fontsize=7)
    save(fig, path)
