"""A deterministic reader of clips: which objects, of which colour and shape, moving where.

It knows the world's palette and shapes but not the scene. Every pixel is explained as a mixture
of the background and one palette colour; each colour with enough area is an object (objects of
one scene differ in colour); its shape is the best of the rendered templates at its centroid and
area; its direction is the slope of its track as long as the track is straight. A background with
a pattern gives the camera's motion, which is added back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.grammar import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, STILL, Wanted, parse
from model.world import Scene, coverage

# Area / radius^2 and distance of the centroid below the centre / radius, of every shape.
_AREA = {"circle": np.pi, "square": 1.76**2, "triangle": 1.6687, "cross": 2.2576}
_DROP = {"circle": 0.0, "square": 0.0, "triangle": 0.1833, "cross": 0.0}
_MIN_AREA = 0.012  # of the short side squared; the smallest object of the world has 0.024
_MIN_MATCH = 0.6  # intersection over union with the best template
_STILL_SPEED = 0.012  # short sides per frame; the slowest object makes 0.025
_STRAIGHT = 0.02  # tolerated distance from a straight, even track, in short sides


@dataclass(frozen=True)
class ObjectReading:
    """One object as read. ``shape`` or ``direction`` is None when it cannot be read."""

    colour: str
    shape: str | None
    direction: str | None  # a key of DIRECTIONS, STILL, or None (an image, or too few frames)
    match: float  # intersection over union with the template of ``shape``
    area: float  # pixels, the largest over the frames
    track: tuple[tuple[float, float] | None, ...]  # centroid (x, y) per frame where visible
    straight: bool  # False when the object changed its course (a bounce, a collision)


@dataclass(frozen=True)
class Reading:
    """What the clip shows; ``objects`` is empty when it is unreadable. Largest object first."""

    objects: tuple[ObjectReading, ...]
    background: str
    camera: tuple[float, float] | None  # pixels per frame; None without a visible pattern


@dataclass(frozen=True)
class Verdict:
    """Which attributes are right for every object that was asked for."""

    shape: bool
    colour: bool
    direction: bool
    count: bool

    @property
    def right(self) -> bool:
        """Shape, colour and direction all right."""
        return self.shape and self.colour and self.direction


def read(video: torch.Tensor) -> Reading:
    """Read a clip, float [3, T, H, W] in [-1, 1]."""
    if video.dim() != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"video: expected [3, T, H, W], got {tuple(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise ValueError("video: expected finite values")
    pixels = (video.detach().double().permute(1, 2, 3, 0).numpy() + 1) / 2
    border = np.concatenate(
        [pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1
    )
    base = np.median(border, axis=1)  # [T, 3]
    palette = np.array(list(COLOURS.values()))
    away = palette[None] - base[:, None]  # [T, colours, 3]
    offset = pixels - base[:, None, None]
    amount = np.einsum("thwc,tkc->tkhw", offset, away)
    amount = np.clip(amount / (away**2).sum(-1)[..., None, None], 0, 1)
    model = amount[..., None] * away[:, :, None, None]
    residual = np.linalg.norm(offset[:, None] - model, axis=-1)  # [T, colours, H, W]
    label = residual.argmin(1)
    objects, covered = [], np.zeros(label.shape, dtype=bool)
    side = min(pixels.shape[1:3])
    alphas = {}
    for number, colour in enumerate(COLOURS):
        alpha = np.where((label == number) & (residual[:, number] < 0.3), amount[:, number], 0.0)
        core = (alpha * (alpha > 0.5)).sum((1, 2))
        if (core > _MIN_AREA * side**2).sum() >= max(1, min(3, len(core) // 3)):
            alphas[colour] = np.where(alpha > 0.12, alpha, 0.0)
            covered |= alpha > 0.12
    largest = max((alpha.sum((1, 2)).max() for alpha in alphas.values()), default=0.0)
    camera = _camera(pixels.mean(-1), covered)
    for colour, alpha in alphas.items():
        if alpha.sum((1, 2)).max() >= 0.12 * largest:
            objects.append(_object(colour, alpha, side, camera))
    names = list(BACKGROUNDS)
    distance = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - np.median(base, 0), axis=-1)
    ordered = tuple(sorted(objects, key=lambda item: -item.area))
    return Reading(ordered, names[int(distance.argmin())], camera)


def _object(
    colour: str, alpha: np.ndarray, side: int, camera: tuple[float, float] | None
) -> ObjectReading:
    frames, height, width = alpha.shape
    area = alpha.sum((1, 2))
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    safe = np.maximum(area, 1e-9)
    x = (alpha * columns).sum((1, 2)) / safe
    y = (alpha * rows[:, None]).sum((1, 2)) / safe
    rim = np.maximum(alpha[:, [0, -1]].max((1, 2)), alpha[:, :, [0, -1]].max((1, 2)))
    seen = area > 0.3 * area.max()
    whole = seen & (area > 0.85 * area.max()) & (rim < 0.3)
    if whole.sum() < min(3, frames):
        whole = seen & (area > 0.7 * area.max())
    shape, match = _shape(alpha[whole], x[whole], y[whole], area[whole])
    direction, straight = _direction(x, y, whole, side, camera)
    track = tuple((float(x[t]), float(y[t])) if seen[t] else None for t in range(frames))
    return ObjectReading(colour, shape, direction, float(match), float(area.max()), track, straight)


def _shape(
    alpha: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray
) -> tuple[str | None, float]:
    """The template with the largest mean intersection over union."""
    best: tuple[str | None, float] = (None, 0.0)
    for shape in SHAPES:
        scores = []
        for mask, column, row, pixels in zip(alpha, x, y, area, strict=True):
            radius = float(np.sqrt(pixels / _AREA[shape]))
            path = np.array([[column, row - _DROP[shape] * radius]])
            template = coverage(shape, radius, path, *mask.shape)[0]
            scores.append(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
        score = float(np.mean(scores)) if scores else 0.0
        if score > best[1]:
            best = (shape, score)
    return best if best[1] >= _MIN_MATCH else (None, best[1])


def _direction(
    x: np.ndarray, y: np.ndarray, usable: np.ndarray, side: int, camera: tuple[float, float] | None
) -> tuple[str | None, bool]:
    """Direction of the longest straight beginning of the track, and whether that is all of it."""
    frames = np.flatnonzero(usable)
    if len(frames) < 2:
        return None, True
    points = np.stack([x[frames], y[frames]], -1)
    for end in range(len(frames), 1, -1):
        basis = np.stack([np.ones(end), frames[:end].astype(np.float64)], -1)
        fit, *_ = np.linalg.lstsq(basis, points[:end], rcond=None)
        error = np.abs(points[:end] - basis @ fit).max()
        if error <= _STRAIGHT * side or end == 2:
            break
    velocity = fit[1] + (np.array(camera) if camera is not None else 0.0)
    straight = end == len(frames)
    if float(np.linalg.norm(velocity)) < _STILL_SPEED * side:
        return STILL, straight
    octant = round(float(np.arctan2(velocity[1], velocity[0])) / (np.pi / 4)) % 8
    return tuple(DIRECTIONS)[octant], straight


def _camera(grey: np.ndarray, covered: np.ndarray) -> tuple[float, float] | None:
    """Camera velocity from the least-squares motion of the uncovered background."""
    if len(grey) < 2:
        return None
    before, after = grey[:-1], grey[1:]
    mean = (before + after) / 2
    down, right = np.gradient(mean, axis=(1, 2))
    free = ~(_grow(covered[:-1]) | _grow(covered[1:]))
    free[:, [0, -1]] = False
    free[:, :, [0, -1]] = False
    gx, gy, change = right[free], down[free], (after - before)[free]
    if len(gx) < 16 or float(np.mean(gx**2 + gy**2)) < 1e-5:
        return None
    motion, *_ = np.linalg.lstsq(np.stack([gx, gy], -1), -change, rcond=None)
    return float(-motion[0]), float(-motion[1])


def _grow(mask: np.ndarray) -> np.ndarray:
    """Dilate by two pixels."""
    grown = np.pad(mask, ((0, 0), (2, 2), (2, 2)))
    height, width = mask.shape[1:]
    shifts = [grown[:, i : i + height, j : j + width] for i in range(5) for j in range(5)]
    return np.any(shifts, axis=0)


def judge(reading: Reading, truth: Scene | str | Sequence[Wanted]) -> Verdict:
    """Compare a reading with a scene, a prompt or a list of wanted objects.

    What the truth leaves open counts as right. Several objects are compared in the order of
    objects that makes most attributes right.
    """
    if isinstance(truth, Scene):
        moving = truth.frames > 1
        wanted: Sequence[Wanted] = [
            Wanted(item.shape, item.colour, item.direction if moving else None)
            for item in truth.objects
        ]
    else:
        wanted = parse(truth) if isinstance(truth, str) else truth
    if not wanted:
        raise ValueError(f"truth: expected at least one object, got {truth!r}")
    best = max(_assignments(list(wanted), list(reading.objects)), key=sum)
    shape, colour, direction = best
    return Verdict(shape, colour, direction, count=len(reading.objects) == len(wanted))


def _assignments(
    wanted: list[Wanted], objects: list[ObjectReading]
) -> list[tuple[bool, bool, bool]]:
    """(shape, colour, direction) right, for every way to pair wanted and read objects up."""
    if not wanted:
        return [(True, True, True)]
    if not objects:
        return [(False, False, False)]
    found = []
    for number, item in enumerate(objects):
        want = wanted[0]
        here = (
            want.shape in (None, item.shape),
            want.colour in (None, item.colour),
            want.direction in (None, item.direction),
        )
        for rest in _assignments(wanted[1:], objects[:number] + objects[number + 1 :]):
            found.append((here[0] and rest[0], here[1] and rest[1], here[2] and rest[2]))
    return found
