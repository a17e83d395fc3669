"""Training data: clips of the world and what is given with them, encoded once, drawn as packs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import CheckpointError, read_tensors, write_tensors
from model.condition import Given, clip_segment
from model.config import DiTConfig, TrainConfig, Weights, WorldConfig, to_dict
from model.draw import draw
from model.flow import interpolate, logit_normal, shift_time, size_shift
from model.text import NO_PROMPT, Vocabulary, text_inputs
from sora_kernels.packing import PackedLayout
from sora_kernels.planner import Cost, plan

Encode = Callable[[Tensor], Tensor]
ENCODE_BATCH = 32


class LatentCache:
    """Latents and captions of many clips in a few flat arrays.

    values: fp16, all latents one after another. shapes: int64 [clips, 4], (C, T, H, W).
    words: int32, word numbers of all captions. word_counts: int64 [clips, 2], short and detailed.
    given_values, given_shapes: as values and shapes, of all given parts [parts].
    given_times: fp32 [parts, 2], time and step in frames. given_counts: int64 [clips].
    loops: uint8 [clips], 1 where the last frame is the first one (None = nowhere).
    """

    NAMES = ("values", "shapes", "words", "word_counts",
             "given_values", "given_shapes", "given_times", "given_counts", "loops")  # fmt: skip

    def __init__(
        self,
        values: Tensor,
        shapes: Tensor,
        words: Tensor,
        word_counts: Tensor,
        given_values: Tensor,
        given_shapes: Tensor,
        given_times: Tensor,
        given_counts: Tensor,
        loops: Tensor | None = None,
    ) -> None:
        self.values, self.shapes = values, shapes
        self.words, self.word_counts = words, word_counts
        self.given_values, self.given_shapes = given_values, given_shapes
        self.given_times, self.given_counts = given_times, given_counts
        self.loops = torch.zeros(len(shapes), dtype=torch.uint8) if loops is None else loops
        self._start = [0, *shapes.prod(1).cumsum(0).tolist()]
        self._word_start = [0, *word_counts.flatten().cumsum(0).tolist()]
        self._given_start = [0, *given_shapes.prod(1).cumsum(0).tolist()]
        self._first_given = [0, *given_counts.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.shapes)

    def latent(self, index: int) -> Tensor:
        """fp32 [C, T, H, W]."""
        flat = self.values[self._start[index] : self._start[index + 1]]
        return flat.float().view(*self.shapes[index].tolist())

    def given(self, index: int) -> list[Given]:
        """What is given with the clip, latents in fp32."""
        parts = []
        for number in range(self._first_given[index], self._first_given[index + 1]):
            flat = self.given_values[self._given_start[number] : self._given_start[number + 1]]
            latent = flat.float().view(*self.given_shapes[number].tolist())
            parts.append(Given(latent, *self.given_times[number].tolist()))
        return parts

    def caption(self, index: int, detailed: bool) -> list[int]:
        """Word numbers."""
        at = 2 * index + int(detailed)
        return self.words[self._word_start[at] : self._word_start[at + 1]].tolist()

    def tokens(self, patch: tuple[int, int, int]) -> np.ndarray:
        """Tokens of every clip with all its parts and its longer caption: what a pack must have
        room for."""
        owners = torch.arange(len(self)).repeat_interleave(self.given_counts)
        volume = self.shapes[:, 1:].prod(1)
        volume += 2 * self.loops * (volume - self.shapes[:, 2:].prod(1))  # see clip_segment
        volume = volume.index_add(0, owners, self.given_shapes[:, 1:].prod(1))
        return (volume // int(np.prod(patch)) + self.word_counts.max(1).values).numpy()


def cache_key(
    world: WorldConfig,
    modes: Weights,
    clips: int,
    seed: int,
    vocabulary: Vocabulary,
    encoder: str,
) -> dict[str, Any]:
    """All that a cache depends on; `encoder` is a fingerprint of the encoder's weights."""
    words = hashlib.sha256(" ".join(vocabulary.words).encode()).hexdigest()
    return {"world": to_dict(world), "modes": [list(pair) for pair in modes], "clips": clips,
            "seed": seed, "words": words, "vae": encoder}  # fmt: skip


class _Encoding:
    """Videos that wait for others of their size, and what has become of them so far."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.latents: list[Tensor | None] = []
        self._waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)

    def add(self, video: Tensor) -> None:
        """Video number `len(self.latents)`, [3, T, H, W]."""
        items = self._waiting[tuple(video.shape)]
        items.append((len(self.latents), video))
        self.latents.append(None)
        if len(items) == ENCODE_BATCH:
            self._encode(items)

    def _encode(self, items: list[tuple[int, Tensor]]) -> None:
        encoded = self.encode(torch.stack([video for _, video in items])).half()
        for (number, _), latent in zip(items, encoded, strict=True):
            self.latents[number] = latent
        items.clear()

    def finish(self) -> tuple[Tensor, Tensor]:
        """All latents, flat, and their shapes [videos, 4], in the order of the videos."""
        for items in self._waiting.values():
            if items:
                self._encode(items)
        done = [latent for latent in self.latents if latent is not None]
        flat = [latent.flatten() for latent in done]
        shapes = torch.tensor([list(latent.shape) for latent in done], dtype=torch.int64)
        return torch.cat(flat) if flat else torch.zeros(0).half(), shapes.view(-1, 4)


def build_cache(
    encode: Encode,
    world: WorldConfig,
    modes: Weights,
    clips: int,
    seed: int,
    vocabulary: Vocabulary,
    max_words: int,
    progress: Callable[[int], None] | None = None,
) -> LatentCache:
    """Draws examples 0 to `clips - 1` of the training split and encodes them, equal sizes together.

    encode: [B, 3, T, H, W] in [-1, 1] -> latents [B, C, t, h, w], of standard deviation about 1.
    """
    mains, givens = _Encoding(encode), _Encoding(encode)
    captions: list[list[int]] = []
    times: list[tuple[float, float]] = []
    counts: list[int] = []
    loops: list[bool] = []
    for index in range(clips):
        example = draw(index, seed, world, modes)
        captions += [vocabulary.encode(text, max_words) for text in example.captions]
        mains.add(example.video)
        for part in example.given:
            givens.add(part.video)
            times.append((part.time, part.step))
        counts.append(len(example.given))
        loops.append(example.loop)
        if progress is not None:
            progress(index + 1)
    return LatentCache(
        *mains.finish(),
        torch.tensor([number for caption in captions for number in caption], dtype=torch.int32),
        torch.tensor([len(caption) for caption in captions]).view(-1, 2),
        *givens.finish(),
        torch.tensor(times, dtype=torch.float32).view(-1, 2),
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor(loops, dtype=torch.uint8),
    )


def save_cache(path: Path, cache: LatentCache, key: dict[str, Any]) -> None:
    """Writes the cache, whole or not at all."""
    write_tensors(path, {name: getattr(cache, name) for name in cache.NAMES}, {"key": key})


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
    wanted: list[Tensor | None]  # the velocity to predict; None for given parts and copies
    owners: list[int]  # the clip (segment) of each grid part


def some_of(given: Sequence[Given], drop: float, rng: np.random.Generator) -> list[Given]:
    """Leaves out each part with probability `drop`, but not all of them."""
    kept = rng.random(len(given)) >= drop
    if len(given) and not kept.any():
        kept[int(rng.integers(len(given)))] = True
    return [part for part, keep in zip(given, kept, strict=True) if keep]


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
    segments, words, latents, givens = [], [], [], []
    for index in clips:
        latent = cache.latent(index)
        detailed, silent = rng.random() < train.detailed, rng.random() < train.no_prompt
        given = some_of(cache.given(index), train.drop, rng)
        caption = [NO_PROMPT] if silent else cache.caption(index, bool(detailed))
        words.append(caption)
        latents.append(latent)
        givens.append(given)
        loop = bool(cache.loops[index])
        segments.append(clip_segment(len(caption), latent.shape[1:], dit.patch, given, loop))
    shifts = [size_shift(segment[-1].num_tokens, dit.base_tokens, train.shift)
              for segment in segments]  # fmt: skip
    times = shift_time(logit_normal(len(shifts), generator), torch.tensor(shifts))
    inputs: list[Tensor] = []
    wanted: list[Tensor | None] = []
    owners: list[int] = []
    for number, (x0, given) in enumerate(zip(latents, givens, strict=True)):
        noise = torch.randn(x0.shape, generator=generator)
        x = interpolate(x0, noise, float(times[number]))
        copies = [x[:, 1:]] * 2 if cache.loops[clips[number]] else []
        inputs += [*(part.latent for part in given), *copies, x]
        wanted += [*(None for _ in (*given, *copies)), noise - x0]
        owners += [number] * (len(given) + len(copies) + 1)
    layout = PackedLayout(segments, **dit.layout)
    return Batch(layout, text_inputs(dit.text, words), times, inputs, wanted, owners)


class PackSource(Protocol):
    """Packs without end: pack `i` is a pure function of i, as numbers of clips."""

    def __getitem__(self, number: int) -> list[int]: ...


class Packs:
    """Packs of clips without end: pack `i` is a pure function of (tokens, budget, width, seed, i).

    The planner sorts by length to fill packs, which would show the model all images in one step and
    all long clips in another. It is therefore given random bundles of BUNDLE clips, which keeps
    packs full (98%) and mixed.
    """

    BUNDLE = 4

    def __init__(self, tokens: np.ndarray, budget: int, width: int, seed: int) -> None:
        if len(tokens) == 0 or tokens.max() > budget:
            largest = max(tokens, default=0)
            raise ValueError(f"tokens: expected clips, none above {budget} tokens, got {largest}")
        self.tokens, self.budget, self.seed = tokens, budget, seed
        self.cost = Cost.of_width(width)
        self._epochs: dict[int, list[list[int]]] = {}

    def __getitem__(self, number: int) -> list[int]:
        epoch = 0
        while number >= len(packs := self._epoch(epoch)):
            number, epoch = number - len(packs), epoch + 1
        return packs[number]

    def _fitting(self, bundle: np.ndarray) -> list[np.ndarray]:
        """The bundle, or, if it is larger than a pack, its clips one by one."""
        fits = self.tokens[bundle].sum() <= self.budget
        return [bundle] if fits else list(bundle[:, None])

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            order = np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.tokens))
            bundles = [
                part
                for start in range(0, len(order), self.BUNDLE)
                for part in self._fitting(order[start : start + self.BUNDLE])
            ]
            sums = np.array([self.tokens[bundle].sum() for bundle in bundles])
            planned = plan(sums, self.budget, cost=self.cost, seed=self.seed, epoch=epoch)
            self._epochs[epoch] = [
                [int(i) for bundle in planned.pack(step, 0) for i in bundles[bundle]]
                for step in range(planned.num_steps)
            ]
        return self._epochs[epoch]
