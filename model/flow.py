"""Rectified flow on one screen: t = 0 is a clean latent, t = 1 is noise, the path is a line.

    x_t = (1 - t) x0 + t noise        v = dx/dt = noise - x0        x_{t'} = x_t + (t' - t) v

The network predicts v. Training draws t from a logit-normal law, sampling walks from t = 1 to 0 by
Euler steps, and both shift t towards noise for large clips, because averaging over many
tokens reveals structure through noise that hides it in a small clip (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DECILES = 10


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point at time `t` on the line from `x0` (t = 0) to `noise` (t = 1)."""
    return x0 + t * (noise - x0)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx/dt along that line: what the network learns to predict."""
    return noise - x0


def euler_step(x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """One Euler step from time `t` to `t_next` (smaller, towards the clean clip)."""
    return x + (t_next - t) * v


def size_shift(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
    """Strength of the shift for a clip of `tokens` tokens: base_shift * sqrt(tokens / base_tokens).

    Noise of standard deviation t/(1-t) on n tokens hides a clip as well as sqrt(n/m) times that
    on m tokens (Esser et al. 2024, section 5.3.2).
    """
    if tokens < 1 or base_tokens < 1:
        raise ValueError(f"tokens, base_tokens: expected >= 1, got {tokens}, {base_tokens}")
    return base_shift * math.sqrt(tokens / base_tokens)


def shift_time(t: Tensor, shift: Tensor | float) -> Tensor:
    """Moves times towards noise: s t / (1 + (s - 1) t). Keeps 0 and 1; s = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """`count` training times in (0, 1): sigmoid of standard normal numbers, fp32, shuffled.

    One from each of `count` equally likely strata, so that every batch sees the whole path.
    """
    strata = torch.randperm(count, generator=generator)
    u = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).float()


def euler_times(steps: int, shift: float = 1.0, start: float = 1.0) -> Tensor:
    """`steps + 1` falling times from `start` to 0, evenly spaced before the shift (fp64)."""
    if steps < 1:
        raise ValueError(f"steps: expected >= 1, got {steps}")
    if not 0 < start <= 1:
        raise ValueError(f"start: expected a time in (0, 1], got {start}")
    before = start / (shift - (shift - 1) * start)
    return shift_time(torch.linspace(before, 0, steps + 1, dtype=torch.float64), shift)


def loss_by_decile(losses: Tensor, t: Tensor) -> tuple[list[float], list[int]]:
    """Sum and count of per-clip `losses` in ten equal bins of `t`: where on the path it is hard."""
    bins = (t * DECILES).long().clamp(0, DECILES - 1)
    sums = torch.zeros(DECILES, dtype=torch.float64).index_add(0, bins, losses.double())
    counts = torch.bincount(bins, minlength=DECILES)
    return sums.tolist(), counts.tolist()


def mean_of_deciles(sums: Sequence[float], counts: Sequence[int]) -> list[float | None]:
    """Mean loss of each bin, None where nothing fell into it."""
    return [s / n if n else None for s, n in zip(sums, counts, strict=True)]
