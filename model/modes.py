"""Every mode as a job: a prompt, a size, and what is given. Jobs of all kinds share one pack.

    text_to_video    nothing given
    image_to_video   a frame at time 0
    extend           a clip that ends at time -1, or starts at time T
    connect          both
    fill             frames at their times
    super_resolve    every `factor`-th frame
    edit             nothing given; the walk starts from the noised clip (SDEdit)
    loop             nothing given; time is a circle

`run` makes the clips, `paste` puts known pixels back, `chain` extends a clip without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.condition import Given, GivenClip
from model.sample import DEFAULT, Request, Sampling, sample
from model.stack import Size, Stack
from model.vae import TIME_STRIDE

CONTEXT = 9  # known frames next to what is made
NEIGHBOURS = 3  # known frames on either side of a gap
WINDOW = 17  # the longest clip that the small model was trained on


@dataclass(frozen=True)
class Job:
    """One clip to make.

    Attributes:
        prompt: what it shows.
        size: of the clip that is made; given frames outside of it do not count.
        given: known frames and clips, of the clip's height and width and 1 + 4k frames each.
        source: a clip [3, T, H, W] of `size` to start from, or None.
        strength: how far the source is noised, in (0, 1].
        loop: the clip's last frame is followed by its first; its frames are a multiple of 4.
        seed: of its noise; the clip does not depend on what shares the pack with it.
    """

    prompt: str
    size: Size
    given: tuple[GivenClip, ...] = ()
    source: Tensor | None = None
    strength: float = 1.0
    loop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = (self.size.height, self.size.width)
        for part in self.given:
            frames, *inside = part.video.shape[1:]
            if tuple(inside) != wanted:
                raise ValueError(f"given: expected {wanted} (H, W), got {tuple(inside)}")
            if frames % TIME_STRIDE != 1:
                raise ValueError(f"given: expected clips of 1 + 4k frames, got {frames}")
        if self.source is not None and Size.of(self.source) != self.size:
            raise ValueError(f"source: expected {self.size}, got {list(self.source.shape)}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected a number in (0, 1], got {self.strength}")
        if self.loop and (self.given or self.source is not None):
            raise ValueError("loop: expected nothing given and no source")
        if self.loop and self.size.frames % TIME_STRIDE:
            raise ValueError(f"loop: expected 4, 8, 12, ... frames, got {self.size.frames}")

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the clip's latent; that of a loop holds its first frame at both ends."""
        return (replace(self.size, frames=self.size.frames + 1) if self.loop else self.size).latent


def text_to_video(prompt: str, size: Size, seed: int = 0) -> Job:
    """A clip, or with one frame an image, from words alone."""
    return Job(prompt, size, seed=seed)


def image_to_video(prompt: str, size: Size, image: Tensor, seed: int = 0) -> Job:
    """A clip whose first frame is `image` [3, 1, H, W]."""
    if image.shape[1] != 1:
        raise ValueError(f"image: expected one frame, got {image.shape[1]}")
    if size.frames == 1:
        raise ValueError("size: expected 2 frames or more to continue an image, got 1")
    return Job(prompt, size, (GivenClip(image, 0),), seed=seed)


def extend(
    prompt: str,
    size: Size,
    clip: Tensor,
    direction: str = "forward",
    context: int = CONTEXT,
    seed: int = 0,
) -> Job:
    """The `size.frames` frames that follow `clip` [3, T, H, W], or with "backward" precede it.

    The `context` frames of the clip that are next to them are given: several, because one frame
    carries no velocity. They should be 1 + 4k.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction: expected 'forward' or 'backward', got {direction!r}")
    part = _before(clip, context) if direction == "forward" else _after(clip, context, size)
    return Job(prompt, size, (part,), seed=seed)


def connect(
    prompt: str, size: Size, before: Tensor, after: Tensor, context: int = CONTEXT, seed: int = 0
) -> Job:
    """The `size.frames` frames that lead from the end of `before` to the start of `after`."""
    given = (_before(before, context), _after(after, context, size))
    return Job(prompt, size, given, seed=seed)


def _before(clip: Tensor, context: int) -> GivenClip:
    return GivenClip(_enough(clip, context)[:, clip.shape[1] - context :], -context)


def _after(clip: Tensor, context: int, size: Size) -> GivenClip:
    return GivenClip(_enough(clip, context)[:, :context], size.frames)


def _enough(clip: Tensor, context: int) -> Tensor:
    if context < 1 or context % TIME_STRIDE != 1:
        raise ValueError(f"context: expected 1 + 4k frames, got {context}")
    if clip.shape[1] < context:
        raise ValueError(f"clip: expected at least {context} frames, got {clip.shape[1]}")
    return clip


def fill(prompt: str, size: Size, frames: Mapping[int, Tensor], seed: int = 0) -> Job:
    """A clip of which the frames [3, 1, H, W] at the given indices are known."""
    outside = sorted(k for k in frames if not 0 <= k < size.frames)
    if outside or not frames:
        raise ValueError(
            f"frames: expected some of frames 0 to {size.frames - 1}, got {outside or 'none'}"
        )
    return Job(prompt, size, tuple(GivenClip(frames[k], k) for k in sorted(frames)), seed=seed)


def super_resolve(prompt: str, clip: Tensor, factor: int, seed: int = 0) -> Job:
    """`clip` [3, T, H, W] with `factor - 1` new frames between any two of its frames."""
    if factor < 2:
        raise ValueError(f"factor: expected an integer >= 2, got {factor}")
    if clip.shape[1] < 2:
        raise ValueError(f"clip: expected at least 2 frames, got {clip.shape[1]}")
    size = replace(Size.of(clip), frames=1 + factor * (clip.shape[1] - 1))
    return fill(prompt, size, {factor * k: clip[:, k : k + 1] for k in range(clip.shape[1])}, seed)


def in_windows(prompt: str, clip: Tensor, factor: int, seed: int = 0) -> list[Job]:
    """`super_resolve` of a clip of any length: jobs of about WINDOW frames, each of which starts
    with the known frame that the one before ends with. See `joined`."""
    stride = max(1, (WINDOW - 1) // factor)
    last = clip.shape[1] - 1
    starts = range(0, max(last, 1), stride)
    return [
        super_resolve(prompt, clip[:, start : start + stride + 1], factor, seed + number)
        for number, start in enumerate(starts)
    ]


def joined(clips: Sequence[Tensor]) -> Tensor:
    """Clips of which each starts with the last frame of the one before, as one."""
    return torch.cat([*(clip[:, :-1] for clip in clips[:-1]), clips[-1]], 1)


def fill_gap(prompt: str, clip: Tensor, start: int, stop: int, seed: int = 0) -> tuple[Job, int]:
    """A job that makes frames `start` to `stop - 1` of `clip` anew, and where its clip begins.

    It sees NEIGHBOURS known frames on each side, and makes these anew, too; `paste` undoes that.
    """
    frames = clip.shape[1]
    if not 0 <= start < stop <= frames or stop - start == frames:
        raise ValueError(
            f"start, stop: expected a part of the clip's frames 0 to {frames}, got {start}, {stop}"
        )
    first, last = max(0, start - NEIGHBOURS), min(frames, stop + NEIGHBOURS)
    known = [k for k in range(first, last) if not start <= k < stop]
    size = replace(Size.of(clip), frames=last - first)
    return fill(prompt, size, {k - first: clip[:, k : k + 1] for k in known}, seed), first


def edit(prompt: str, clip: Tensor, strength: float, seed: int = 0) -> Job:
    """`clip` [3, T, H, W] as the prompt says: noised to time `strength`, and walked back (SDEdit).

    Meng et al., arXiv 2108.01073. Little strength keeps the clip, 1 forgets it.
    """
    return Job(prompt, Size.of(clip), source=clip, strength=strength, seed=seed)


def loop(prompt: str, size: Size, seed: int = 0) -> Job:
    """A clip whose last frame is followed by its first one; its frames are a multiple of 4."""
    return Job(prompt, size, loop=True, seed=seed)


@torch.no_grad()
def run(
    stack: Stack,
    jobs: Sequence[Job],
    sampling: Sampling = DEFAULT,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """The clips [3, T, H, W] in [-1, 1] of all jobs, in order, sampled in ONE pack.

    Nothing known is pasted back: see `paste`.

    Raises:
        UnknownWords, ValueError: a prompt that the model cannot read.
    """
    limit = stack.dit.config.max_words
    words = [stack.words.encode(job.prompt, limit) for job in jobs]
    latents = iter(stack.encode([part.video for job in jobs for part in job.given]))
    sources = iter(stack.encode([job.source for job in jobs if job.source is not None]))
    requests = [
        Request(
            numbers,
            job.latent,
            job.seed,
            tuple(Given(next(latents), part.time, part.step) for part in job.given),
            None if job.source is None else next(sources),
            job.strength,
            job.loop,
        )
        for numbers, job in zip(words, jobs, strict=True)
    ]
    made = sample(stack.dit, requests, sampling, progress)
    made = [around(x) if job.loop else x for x, job in zip(made, jobs, strict=True)]
    clips = stack.decode(made)
    return [cropped(clip, job) for clip, job in zip(clips, jobs, strict=True)]


def around(latent: Tensor) -> Tensor:
    """The latent of a loop [C, 1 + k, h, w], twice around: the second time, every frame is decoded
    with the frames before it on the circle as its context."""
    return torch.cat([latent, latent[:, 1:]], 1)


def cropped(clip: Tensor, job: Job) -> Tensor:
    """What was made without its padding; of a loop, the second time around."""
    frames, height, width = job.size.frames, job.size.height, job.size.width
    clip = clip[:, -frames - 1 : -1] if job.loop else clip[:, :frames]
    return clip[:, :, :height, :width]


def paste(job: Job, clip: Tensor) -> Tensor:
    """`clip`, made by `job`, with the known pixels in place of the frames at their times."""
    pasted = clip.clone()
    for part in job.given:
        for k in range(part.video.shape[1]):
            time = part.time + k * part.step
            if time == int(time) and 0 <= time < clip.shape[1]:
                pasted[:, int(time)] = part.video[:, k]
    return pasted


def chain(
    stack: Stack,
    prompt: str,
    size: Size,
    count: int,
    clip: Tensor | None = None,
    *,
    direction: str = "forward",
    context: int = CONTEXT,
    seed: int = 0,
    sampling: Sampling = DEFAULT,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """`count` clips [3, size.frames, H, W], each of which extends the one before; the first one
    extends `clip`, or is made from words. Clip i has the noise of `seed + i`.

    Only `context` frames are kept, so memory does not grow with the length.
    """
    for number in range(count):
        if clip is None:
            job = text_to_video(prompt, size, seed)
        else:
            job = extend(prompt, size, clip, direction, context, seed + number)
        (made,) = run(stack, [job], sampling, progress)
        yield made
        if direction == "forward":
            clip = (made if clip is None else torch.cat([clip, made], 1))[:, -context:].clone()
        else:
            clip = (made if clip is None else torch.cat([made, clip], 1))[:, :context].clone()
