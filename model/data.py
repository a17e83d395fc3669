"""Training data: clips of the world, encoded once, and drawn as packs of clips of every size."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import CheckpointError, read_tensors, write_tensors
from model.condition import clip_segment, grids, split_given
from model.config import DiTConfig, TrainConfig, WorldConfig, to_dict
from model.flow import interpolate, logit_normal, shift_time, size_shift
from model.text import NO_PROMPT, Vocabulary
from model.world import clip
from sora_kernels.packing import PackedLayout
from sora_kernels.planner import Cost, plan

Encode = Callable[[Tensor], Tensor]
ENCODE_BATCH = 32


class LatentCache:
    """Latents and captions of many clips in a few flat arrays.

    values: fp16, all latents one after another. shapes: int64 [clips, 4], (C, T, H, W).
    words: int32, word numbers of all captions; clip i has two, short and detailed.
    """

    def __init__(self, values: Tensor, shapes: Tensor, words: Tensor, word_counts: Tensor) -> None:
        self.values, self.shapes = values, shapes
        self.words, self.word_counts = words, word_counts
        self._start = [0, *shapes.prod(1).cumsum(0).tolist()]
        self._word_start = [0, *word_counts.flatten().cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.shapes)

    def latent(self, index: int) -> Tensor:
        """fp32 [C, T, H, W]."""
        flat = self.values[self._start[index] : self._start[index + 1]]
        return flat.float().view(*self.shapes[index].tolist())

    def caption(self, index: int, detailed: bool) -> list[int]:
        """Word numbers."""
        at = 2 * index + int(detailed)
        return self.words[self._word_start[at] : self._word_start[at + 1]].tolist()

    def tokens(self, patch: tuple[int, int, int]) -> np.ndarray:
        """Tokens of every clip with its longer caption: what a pack must have room for."""
        volume = self.shapes[:, 1:].prod(1) // int(np.prod(patch))
        return (volume + self.word_counts.max(1).values).numpy()


def cache_key(
    world: WorldConfig, clips: int, seed: int, vocabulary: Vocabulary, encoder: str
) -> dict[str, Any]:
    """All that a cache depends on; `encoder` is a fingerprint of the encoder's weights."""
    words = hashlib.sha256(" ".join(vocabulary.words).encode()).hexdigest()
    return {"world": to_dict(world), "clips": clips, "seed": seed, "words": words, "vae": encoder}


def build_cache(
    encode: Encode,
    world: WorldConfig,
    clips: int,
    seed: int,
    vocabulary: Vocabulary,
    max_words: int,
    progress: Callable[[int], None] | None = None,
) -> LatentCache:
    """Renders clips 0 to `clips - 1` of the training split and encodes them, equal sizes together.

    encode: [B, 3, T, H, W] in [-1, 1] -> latents [B, C, t, h, w], of standard deviation about 1.
    """
    latents: list[Tensor | None] = [None] * clips
    captions: list[list[int]] = []
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)

    def flush(items: list[tuple[int, Tensor]]) -> None:
        encoded = encode(torch.stack([video for _, video in items])).half()
        for (index, _), latent in zip(items, encoded, strict=True):
            latents[index] = latent
        items.clear()

    for index in range(clips):
        made = clip(index, "train", seed, world)
        captions += [vocabulary.encode(text, max_words) for text in (made.short, made.detailed)]
        items = waiting[tuple(made.video.shape)]
        items.append((index, made.video))
        if len(items) == ENCODE_BATCH:
            flush(items)
        if progress is not None:
            progress(index + 1)
    for items in waiting.values():
        if items:
            flush(items)
    done = [latent for latent in latents if latent is not None]
    return LatentCache(
        torch.cat([latent.flatten() for latent in done]),
        torch.tensor([list(latent.shape) for latent in done]),
        torch.tensor([number for caption in captions for number in caption], dtype=torch.int32),
        torch.tensor([len(caption) for caption in captions]).view(-1, 2),
    )


def save_cache(path: Path, cache: LatentCache, key: dict[str, Any]) -> None:
    """Writes the cache, whole or not at all."""
    names = ("values", "shapes", "words", "word_counts")
    write_tensors(path, {name: getattr(cache, name) for name in names}, {"key": key})


def load_cache(path: Path, key: dict[str, Any]) -> LatentCache | None:
    """The cache in `path` if it was made with `key`, else None."""
    if not path.exists():
        return None
    tensors, notes = read_tensors(path)
    if notes.get("key") != key:
        return None
    try:
        return LatentCache(**tensors)
    except TypeError as error:
        raise CheckpointError(f"cache: {path} holds other tensors than a latent cache") from error


@dataclass(frozen=True)
class Batch:
    """One pack, ready for the model. Lists have one entry per grid part."""

    layout: PackedLayout
    words: Tensor
    times: Tensor
    inputs: list[Tensor]
    wanted: list[Tensor | None]  # the velocity to predict; None for given parts
    owners: list[int]  # the clip (segment) of each grid part


def make_batch(
    cache: LatentCache,
    clips: Sequence[int],
    dit: DiTConfig,
    train: TrainConfig,
    step: int,
) -> Batch:
    """Noises the clips of one pack. All chance comes from (seed, step)."""
    rng = np.random.default_rng([train.seed, 1, step])
    generator = torch.Generator().manual_seed((train.seed << 32) + step)
    segments, words, tokens, latents = [], [], [], []
    for index in clips:
        latent = cache.latent(index)
        detailed, silent = rng.random() < train.detailed, rng.random() < train.no_prompt
        known = 0
        _, t, h, w = latent.shape
        frames = t // dit.patch[0]
        if rng.random() < train.given and frames > 1:
            known = int(rng.integers(1, min(frames, 3)))
        caption = [NO_PROMPT] if silent else cache.caption(index, bool(detailed))
        words += caption
        latents.append(latent)
        segments.append(clip_segment(len(caption), (t, h, w), dit.patch, known))
        tokens.append(sum(part.num_tokens for part in grids(segments[-1])))
    shifts = torch.tensor([size_shift(n, dit.base_tokens, train.shift) for n in tokens])
    times = shift_time(logit_normal(len(tokens), generator), shifts)
    inputs: list[Tensor] = []
    wanted: list[Tensor | None] = []
    owners: list[int] = []
    for number, (latent, segment) in enumerate(zip(latents, segments, strict=True)):
        for part, x0 in zip(grids(segment), split_given(latent, segment, dit.patch), strict=True):
            noise = torch.randn(x0.shape, generator=generator)
            inputs.append(x0 if part.given else interpolate(x0, noise, float(times[number])))
            wanted.append(None if part.given else noise - x0)
            owners.append(number)
    layout = PackedLayout(segments, **dit.layout)
    return Batch(layout, torch.tensor(words), times, inputs, wanted, owners)


class Packs:
    """Packs of clips without end: pack `i` is a pure function of (tokens, budget, width, seed, i).

    The planner sorts by length to fill packs, which would show the model all images in one step and
    all long clips in another. It is therefore given random bundles of BUNDLE clips, which keeps
    packs full (98%) and mixed.
    """

    BUNDLE = 4

    def __init__(self, tokens: np.ndarray, budget: int, width: int, seed: int) -> None:
        largest = int(np.sort(tokens)[-self.BUNDLE :].sum())
        if len(tokens) == 0 or largest > budget:
            raise ValueError(f"tokens: expected a pack of at least {largest}, got {budget}")
        self.tokens, self.budget, self.seed = tokens, budget, seed
        self.cost = Cost.of_width(width)
        self._epochs: dict[int, list[list[int]]] = {}

    def __getitem__(self, number: int) -> list[int]:
        epoch = 0
        while number >= len(packs := self._epoch(epoch)):
            number, epoch = number - len(packs), epoch + 1
        return packs[number]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            order = np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.tokens))
            bundles = [order[i : i + self.BUNDLE] for i in range(0, len(order), self.BUNDLE)]
            sums = np.array([self.tokens[bundle].sum() for bundle in bundles])
            planned = plan(sums, self.budget, cost=self.cost, seed=self.seed, epoch=epoch)
            self._epochs[epoch] = [
                [int(i) for bundle in planned.pack(step, 0) for i in bundles[bundle]]
                for step in range(planned.num_steps)
            ]
        return self._epochs[epoch]
