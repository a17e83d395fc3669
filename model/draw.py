"""Training examples of every mode: a clip of the world and what of it, or around it, is given."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from model.condition import GivenClip
from model.config import Weights, WorldConfig
from model.world import DIRECTIONS, HELD_OUT, Scene, captions, clip, render, sample_scene

CONTEXTS = (5, 9)
MOST_FRAMES = 6
# What goes on outside the clip must follow from the caption, or from what is given.
LONG_KINDS: Weights = (("one", 0.40), ("bounce", 0.45), ("exit", 0.10), ("still", 0.05))
LOOP_KINDS: Weights = (("one", 0.9), ("still", 0.1))
WAY = 9  # frames of one way of a loop of 16


@dataclass(frozen=True)
class Example:
    """A clip [3, T, H, W] in [-1, 1], what is given with it, and its captions (short, detailed).

    loop: its last frame is its first one.
    """

    video: Tensor
    given: tuple[GivenClip, ...]
    captions: tuple[str, str]
    loop: bool = False


def draw(index: int, seed: int, world: WorldConfig, modes: Weights) -> Example:
    """Example `index` of the training split, a pure function of its arguments.

    modes: (name, weight) with the names of `model.config.MODES`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"modes"), index])
    shares = np.array([weight for _, weight in modes], dtype=np.float64)
    mode = modes[int(rng.choice(len(modes), p=shares / shares.sum()))][0]
    if mode in ("forward", "backward", "connect"):
        return _inside_longer(rng, mode, world)
    if mode == "loop":
        return _there_and_back(rng, world)
    made = clip(index, "train", seed, world)
    frames = made.video.shape[1]
    times: list[int] = []
    if frames > 1 and mode == "image":
        times = [0]
    elif frames > 1 and mode == "frame":
        times = [int(rng.integers(frames))]
    elif frames > 1 and mode == "fill":
        times = _several(rng, frames)
    given = tuple(GivenClip(made.video[:, k : k + 1], k) for k in times)
    return Example(made.video, given, (made.short, made.detailed))


def _several(rng: np.random.Generator, frames: int) -> list[int]:
    """2 to MOST_FRAMES frames: evenly spaced from the first one on, or any."""
    spacings = [f for f in (2, 4, 8, 16) if f < frames and (frames - 1) // f < MOST_FRAMES]
    if rng.random() < 0.6:
        return list(range(0, frames, int(rng.choice(spacings))))
    count = int(rng.integers(2, min(MOST_FRAMES, frames)))
    return sorted(int(k) for k in rng.choice(frames, count, replace=False))


def _inside_longer(rng: np.random.Generator, mode: str, world: WorldConfig) -> Example:
    """A clip cut out of a longer scene, given what comes before it, after it, or both."""
    lengths = [(frames, weight) for frames, weight in world.frames if frames > 1]
    shares = np.array([weight for _, weight in lengths], dtype=np.float64)
    frames = int(lengths[int(rng.choice(len(lengths), p=shares / shares.sum()))][0])
    before = 0 if mode == "backward" else int(rng.choice(CONTEXTS))
    after = 0 if mode == "forward" else int(rng.choice(CONTEXTS))
    longer = replace(world, kinds=LONG_KINDS)
    scene = sample_scene(rng, longer, frames=before + frames + after)
    video = render(scene)
    given = []
    if before:
        given.append(GivenClip(video[:, :before], -before))
    if after:
        given.append(GivenClip(video[:, before + frames :], frames))
    short, detailed = captions(scene)
    if scene.kind == "bounce":  # the heading changes: the short caption is true of every part
        short = re.sub(r" moving [a-z-]+", "", short)
    return Example(video[:, before : before + frames], tuple(given), (short, detailed))


def _there_and_back(rng: np.random.Generator, world: WorldConfig) -> Example:
    """A clip whose end is its beginning: an object goes a way and comes back.

    It begins in the middle of the way, so that no turn lies at the seam, and its turns are frames
    4 and 12, the ends of latents, which the VAE can follow.
    """
    scene = sample_scene(rng, replace(world, kinds=LOOP_KINDS), frames=WAY)
    while way_back_is_held_out(scene):
        scene = sample_scene(rng, replace(world, kinds=LOOP_KINDS), frames=WAY)
    ring = [*range(WAY), *range(WAY - 2, 0, -1)]
    ring = [*ring[WAY // 2 :], *ring[: WAY // 2 + 1]]
    short, detailed = (
        re.sub(r" moving [a-z-]+( slowly| quickly)?", " bouncing off the wall", text)
        for text in captions(scene)
    )
    return Example(render(scene)[:, ring], (), (short, detailed), loop=True)


def way_back_is_held_out(scene: Scene) -> bool:
    """Whether an object of the scene, going the other way, would show a held-out combination."""
    directions = list(DIRECTIONS)  # in the order of their angles
    back = {name: directions[(k + 4) % 8] for k, name in enumerate(directions)}
    return any(
        (item.shape, item.colour, back.get(item.direction)) in HELD_OUT for item in scene.objects
    )
