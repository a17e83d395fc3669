"""Sampling: many clips of different sizes walk from noise to latents in one packed batch.

`euler` is the sampler, a pure function of a velocity, a start and a schedule. `guided` makes that
velocity from a model: each clip sits twice in ONE pack, with its prompt and without, so guidance
costs one forward pass of 2x the segments and no padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.condition import Given, clip_segment
from model.dit import DiT
from model.flow import euler_step, euler_times, interpolate, size_shift
from model.text import NO_PROMPT, text_inputs
from sora_kernels.packing import PackedLayout

Velocity = Callable[[list[Tensor], Tensor], list[Tensor]]
Rule = Callable[[list[Tensor], Tensor], None]


@dataclass(frozen=True)
class Request:
    """One clip to make.

    Attributes:
        words: word numbers of the prompt.
        latent: (T, H, W) of its latent.
        seed: of its noise; a clip draws its own noise, whatever it shares the pack with.
        given: what is known of it or around it.
        source: a latent [C, T, H, W] to start from, noised to time `strength`, in place of noise.
        strength: where its walk begins, in (0, 1]; 1 is noise, and a source then has no say.
        loop: its last frame is its first one.
        unprompted: word numbers of "no prompt", as the model was trained with them.
    """

    words: Sequence[int]
    latent: tuple[int, int, int]
    seed: int = 0
    given: Sequence[Given] = ()
    source: Tensor | None = None
    strength: float = 1.0
    loop: bool = False
    unprompted: Sequence[int] = (NO_PROMPT,)

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected a number in (0, 1], got {self.strength}")
        if self.source is None and self.strength != 1:
            raise ValueError(f"strength: expected 1 without a source, got {self.strength}")
        if self.source is not None and tuple(self.source.shape[1:]) != tuple(self.latent):
            raise ValueError(
                f"source: expected a latent of {list(self.latent)}, got {list(self.source.shape)}"
            )


@dataclass(frozen=True)
class Sampling:
    """How to walk: number of Euler steps, guidance scale, and shift at the model's base size."""

    steps: int = 12
    guidance: float = 3.0
    shift: float = 2.0


DEFAULT = Sampling()


def euler(
    velocity: Velocity,
    parts: Sequence[Tensor],
    moving: Sequence[int | None],
    schedule: Tensor,
    progress: Callable[[int], None] | None = None,
    settle: Rule = lambda x, times: None,
) -> list[Tensor]:
    """Integrates dx = v dt along `schedule` [K + 1, S]; column s holds the times of clip s.

    `moving[i]` is the clip of part i, or None for a part that stays as it is (given).
    `settle(parts, times)` may replace parts of the list after every step, `times` [S] of its end.
    """
    x = list(parts)
    for k in range(schedule.shape[0] - 1):
        now, then = schedule[k], schedule[k + 1]
        v = velocity(x, now.float())
        x = [
            xi if s is None else euler_step(xi, vi, float(now[s]), float(then[s]))
            for xi, vi, s in zip(x, v, moving, strict=True)
        ]
        settle(x, then)
        if progress is not None:
            progress(k + 1)
    return x


def guided(model: DiT, requests: Sequence[Request], guidance: float) -> Velocity:
    """The velocity of all requests in one pack.

    guidance 1 runs the prompts alone; otherwise v = v0 + guidance * (v1 - v0), with v1 of the
    prompt and v0 of "no prompt" (Ho & Salimans 2022).
    """
    patch, device = model.config.patch, next(model.parameters()).device
    twice = guidance != 1.0
    prompts = [(r, r.words) for r in requests]
    if twice:
        prompts += [(r, r.unprompted) for r in requests]
    segments = [clip_segment(len(w), r.latent, patch, r.given, r.loop) for r, w in prompts]
    layout = PackedLayout(segments, **model.config.layout, device=device)
    words = text_inputs(model.config.text, [w for _, w in prompts]).to(device)

    def velocity(parts: list[Tensor], times: Tensor) -> list[Tensor]:
        times = times.to(device)
        if not twice:
            return model(parts, layout, words, times)
        both = model(parts * 2, layout, words, times.repeat(2))
        prompted, free = both[: len(parts)], both[len(parts) :]
        return [v0 + guidance * (v1 - v0) for v1, v0 in zip(prompted, free, strict=True)]

    return velocity


def start_noise(channels: int, latent: tuple[int, int, int], seed: int) -> Tensor:
    """The noise [C, T, H, W] that `seed` stands for, the same on every device."""
    return torch.randn(channels, *latent, generator=torch.Generator().manual_seed(seed))


def start_of(request: Request, channels: int) -> Tensor:
    """Where the clip's walk begins [C, T, H, W]: noise, or its source noised to `strength`."""
    noise = start_noise(channels, request.latent, request.seed)
    if request.source is None:
        return noise
    return interpolate(request.source.to(noise), noise, request.strength)


def _copy(main: int, x: list[Tensor], times: Tensor) -> None:
    """The two parts before part `main` are its latents from 1 on."""
    x[main - 2] = x[main - 1] = x[main][:, 1:]


def _lead(
    main: int, clip: int, latent: Tensor, noise: Tensor, x: list[Tensor], times: Tensor
) -> None:
    """The first latents of part `main` stand where the way from the noise to `latent` is now."""
    count = min(latent.shape[1], noise.shape[1])
    led = interpolate(latent[:, :count], noise[:, :count], float(times[clip]))
    x[main] = torch.cat([led, x[main][:, count:]], 1)


@torch.no_grad()
def sample(
    model: DiT,
    requests: Sequence[Request],
    sampling: Sampling = DEFAULT,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Latents [C, T, H, W] of all requests, in order, sampled in one pack.

    A given part that begins with the clip has the clip's own first latents, because the VAE is
    causal: these do not walk freely, but straight from the noise to what is given.

    Raises ValueError for latents that the patch does not divide or that have other channels.
    """
    if not requests:
        return []
    config = model.config
    device = next(model.parameters()).device
    parts: list[Tensor] = []
    moving: list[int | None] = []
    columns: list[Tensor] = []
    rules: list[Rule] = []
    for number, request in enumerate(requests):
        for known in (*(part.latent for part in request.given), request.source):
            if known is not None and known.shape[0] != config.channels:
                raise ValueError(
                    f"given, source: expected {config.channels} channels, got {known.shape[0]}"
                )
        parts += [part.latent.to(device) for part in request.given]
        start = start_of(request, config.channels).to(device)
        if request.loop:
            rules.append(partial(_copy, len(parts) + 2))
            parts += [start[:, 1:]] * 2
        parts.append(start)
        for part in request.given:
            if part.time == 0 and part.step == 1 and part.latent.shape[2:] == start.shape[2:]:
                noise = start_noise(config.channels, request.latent, request.seed).to(device)
                latent = part.latent.to(device)
                rules.append(partial(_lead, len(parts) - 1, number, latent, noise))
        moving += [None] * (len(parts) - len(moving) - 1) + [number]
        tokens = math.prod(request.latent) // math.prod(config.patch)
        shift = size_shift(tokens, config.base_tokens, sampling.shift)
        columns.append(euler_times(sampling.steps, shift, request.strength))
    velocity = guided(model, requests, sampling.guidance)

    def settle(x: list[Tensor], times: Tensor) -> None:
        for rule in rules:
            rule(x, times)

    parts = euler(velocity, parts, moving, torch.stack(columns, dim=1), progress, settle)
    return [part for part, clip in zip(parts, moving, strict=True) if clip is not None]
