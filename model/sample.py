"""Sampling: many clips of different sizes walk from noise to latents in one packed batch.

`euler` is the sampler, a pure function of a velocity, a start and a schedule. `guided` makes that
velocity from a model: each clip sits twice in ONE pack, with its prompt and without, so guidance
costs one forward pass of 2x the segments and no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.condition import clip_segment, grids, split_given
from model.dit import DiT
from model.flow import euler_step, euler_times, size_shift
from model.text import NO_PROMPT
from sora_kernels.packing import PackedLayout, Part

Velocity = Callable[[list[Tensor], Tensor], list[Tensor]]


@dataclass(frozen=True)
class Request:
    """One clip to make.

    Attributes:
        words: word numbers of the prompt.
        latent: (T, H, W) of the whole latent.
        seed: of its noise; a clip draws its own noise, whatever it shares the pack with.
        given: clean first latents [C, t, H, W] to continue, or None.
    """

    words: Sequence[int]
    latent: tuple[int, int, int]
    seed: int = 0
    given: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How to walk: number of Euler steps, guidance scale, and shift at the model's base size."""

    steps: int = 12
    guidance: float = 6.0
    shift: float = 2.0


DEFAULT = Sampling()


def euler(
    velocity: Velocity,
    parts: Sequence[Tensor],
    moving: Sequence[int | None],
    schedule: Tensor,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Integrates dx = v dt along `schedule` [K + 1, S]; column s holds the times of clip s.

    `moving[i]` is the clip of part i, or None for a part that stays as it is (given).
    """
    x = list(parts)
    for k in range(schedule.shape[0] - 1):
        now, then = schedule[k], schedule[k + 1]
        v = velocity(x, now.float())
        x = [
            xi if s is None else euler_step(xi, vi, float(now[s]), float(then[s]))
            for xi, vi, s in zip(x, v, moving, strict=True)
        ]
        if progress is not None:
            progress(k + 1)
    return x


def segment_of(
    request: Request, patch: tuple[int, int, int], words: int | None = None
) -> list[Part]:
    """The parts of a request's segment, with its own number of words or another."""
    known = 0 if request.given is None else request.given.shape[1]
    if known % patch[0]:
        raise ValueError(f"given: expected a multiple of {patch[0]} latent frames, got {known}")
    count = len(request.words) if words is None else words
    return clip_segment(count, request.latent, patch, known // patch[0])


def guided(model: DiT, requests: Sequence[Request], guidance: float) -> Velocity:
    """The velocity of all requests in one pack.

    guidance 1 runs the prompts alone; otherwise v = v0 + guidance * (v1 - v0), with v1 of the
    prompt and v0 of "no prompt" (Ho & Salimans 2022).
    """
    patch, device = model.config.patch, next(model.parameters()).device
    segments = [segment_of(request, patch) for request in requests]
    words = [number for request in requests for number in request.words]
    twice = guidance != 1.0
    if twice:
        segments += [segment_of(request, patch, words=1) for request in requests]
        words += [NO_PROMPT] * len(requests)
    layout = PackedLayout(segments, **model.config.layout, device=device)
    numbers = torch.tensor(words, device=device)

    def velocity(parts: list[Tensor], times: Tensor) -> list[Tensor]:
        times = times.to(device)
        if not twice:
            return model(parts, layout, numbers, times)
        both = model(parts * 2, layout, numbers, times.repeat(2))
        prompted, free = both[: len(parts)], both[len(parts) :]
        return [v0 + guidance * (v1 - v0) for v1, v0 in zip(prompted, free, strict=True)]

    return velocity


def start_noise(channels: int, latent: tuple[int, int, int], seed: int) -> Tensor:
    """The noise [C, T, H, W] that `seed` stands for, the same on every device."""
    return torch.randn(channels, *latent, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: DiT,
    requests: Sequence[Request],
    sampling: Sampling = DEFAULT,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Latents [C, T, H, W] of all requests, in order; given latents come back unchanged.

    Raises ValueError for a latent that the patch does not divide or given latents that do not fit.
    """
    if not requests:
        return []
    config = model.config
    device = next(model.parameters()).device
    velocity = guided(model, requests, sampling.guidance)
    parts: list[Tensor] = []
    moving: list[int | None] = []
    owners: list[int] = []
    columns: list[Tensor] = []
    for number, request in enumerate(requests):
        start = start_noise(config.channels, request.latent, request.seed).to(device)
        if request.given is not None:
            known = request.given.shape[1]
            if request.given.shape != start[:, :known].shape:
                raise ValueError(
                    f"given: expected [{config.channels}, t, {request.latent[1]}, "
                    f"{request.latent[2]}], got {list(request.given.shape)}"
                )
            start[:, :known] = request.given
        segment = segment_of(request, config.patch)
        parts += split_given(start, segment, config.patch)
        moving += [None if part.given else number for part in grids(segment)]
        owners += [number] * len(grids(segment))
        tokens = sum(part.num_tokens for part in grids(segment))
        shift = size_shift(tokens, config.base_tokens, sampling.shift)
        columns.append(euler_times(sampling.steps, shift))
    parts = euler(velocity, parts, moving, torch.stack(columns, dim=1), progress)
    clips: list[list[Tensor]] = [[] for _ in requests]
    for part, owner in zip(parts, owners, strict=True):
        clips[owner].append(part)
    return [torch.cat(clip, dim=1) for clip in clips]
