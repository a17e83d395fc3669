"""What the studies measure of a model: loss on clips it never saw, and what the oracle reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import metrics
from model.config import TrainConfig, WorldConfig
from model.data import LatentCache, Packs, make_batch
from model.dit import DiT
from model.grammar import parse
from model.oracle import read
from model.sample import Request, Sampling, sample
from model.stack import Size, Stack
from model.text import NO_PROMPT
from model.train import batch_loss
from model.world import Scene, captions, render, sample_scene

WHOLE = (0.75, 1.33)  # of an object's area are to be seen in every frame: not less, not more
BATCH = 16
SAMPLING = Sampling(steps=10, guidance=3.0, shift=2.0)


@dataclass(frozen=True)
class Ask:
    """A prompt, and the true clip of a scene that it describes."""

    scene: Scene
    prompt: str
    video: Tensor


def asks(
    world: WorldConfig, sizes: Sequence[tuple[int, int]], frames: int, count: int
) -> list[Ask]:
    """`count` scenes of one moving object, sizes (height, width) in turn; none is trained on."""
    found = []
    for index in range(count):
        rng = np.random.default_rng([7, 12, index])
        size = sizes[index % len(sizes)]
        scene = sample_scene(rng, world, kind="one", size=size, frames=frames)
        found.append(Ask(scene, captions(scene)[0], render(scene)))
    return found


@torch.no_grad()
def answers(
    stack: Stack,
    wanted: Sequence[Ask],
    unprompted: Sequence[int] = (NO_PROMPT,),
    sampling: Sampling = SAMPLING,
) -> list[Tensor]:
    """A clip for every ask; ask number k always starts from noise number k."""
    limit = stack.dit.config.max_words
    requests = [
        Request(stack.words.encode(ask.prompt, limit), Size.of(ask.video).latent, number,
                unprompted=unprompted)
        for number, ask in enumerate(wanted)
    ]  # fmt: skip
    clips: list[Tensor] = []
    for start in range(0, len(requests), BATCH):
        clips += stack.decode(sample(stack.dit, requests[start : start + BATCH], sampling))
    return clips


def attributes(wanted: Sequence[Ask], clips: Sequence[Tensor]) -> dict[str, float]:
    """`all`: rate of clips with every attribute right; `each`: mean rate of single attributes."""
    every, single = [], []
    for ask, clip in zip(wanted, clips, strict=True):
        frames, side = clip.shape[1], min(clip.shape[2:])
        flags = metrics.joint(read(clip), parse(ask.prompt), frames, side)
        every.append(bool(flags.pop("all")))
        single.append(np.mean([flag for flag in flags.values() if flag is not None]))
    return {"all": float(np.mean(every)), "each": float(np.mean(single))}


def framed(wanted: Sequence[Ask], clips: Sequence[Tensor]) -> dict[str, float]:
    """`framed`: rate of clips that show the object in its size in every frame, cut off nowhere.

    How large it is, the true clip says, which shows the same shape in the same size class. `seen`
    is the mean share of it over all frames, at most 1 each.
    """
    rates, shares = [], []
    for ask, clip in zip(wanted, clips, strict=True):
        background = ask.scene.background
        area = np.median(metrics.object_mask(ask.video, background).sum((1, 2)))
        share = metrics.object_mask(clip, background).sum((1, 2)) / area
        rates.append(bool(((share >= WHOLE[0]) & (share <= WHOLE[1])).all()))
        shares.append(np.minimum(share, 1).mean())
    return {"framed": float(np.mean(rates)), "seen": float(np.mean(shares))}


class Validation:
    """The velocity's loss on the same clips, noises and times for every model."""

    def __init__(self, cache: LatentCache, tokens: int, packs: int) -> None:
        self.cache, self.tokens, self.packs = cache, tokens, packs

    def __call__(self, model: DiT) -> float:
        config = TrainConfig("tiny", "tiny", len(self.cache), self.tokens, steps=1,
                             no_prompt=0.0, detailed=0.0, seed=999)  # fmt: skip
        order = Packs(self.cache.tokens(model.config.patch), self.tokens, model.config.width, 999)
        total, count = 0.0, 0
        for step in range(self.packs):
            batch = make_batch(self.cache, order[step], model.config, config, step)
            _, per_clip = batch_loss(model, batch)
            total += float(per_clip.sum())
            count += len(per_clip)
        return total / count
