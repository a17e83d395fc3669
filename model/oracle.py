"""A deterministic reader of clips: which objects, of which colour, shape and size, moving how.

It knows the world's palette and shapes but not the scene. Every pixel is explained as a mixture
of the background and one palette colour; each colour with enough area is an object (objects of
one scene differ in colour). Every shape's template, as large as the object's area says, is fitted
to every frame by least squares; the one with the largest overlap is the shape, its places are the
object's positions, and a frame whose overlap is low is unreadable. Direction and speed are the
slope of the track as long as the track is straight. A background with a pattern gives the
camera's motion, which is added back.

What it reads is frozen: see ``model.judge.frozen`` and docs/benchmark.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from model.grammar import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    STILL,
    Wanted,
    parse,
)  # fmt: skip
from model.world import Scene, coverage

ORACLE_VERSION = "2"
"""Changes with every change of what the oracle, the world or the grammar does."""

# Area / radius^2 and distance of the centroid below the centre / radius, of every shape.
_AREA = {"circle": np.pi, "square": 1.76**2, "triangle": 1.6687, "cross": 2.2576}
_DROP = {"circle": 0.0, "square": 0.0, "triangle": 0.1833, "cross": 0.0}
_MIN_AREA = 0.012  # of the short side squared; the smallest object of the world has 0.024
_MIN_MATCH = 0.6  # intersection over union with the best template
_MIN_SEEN = 0.3  # of an object's area; less of it is not a reading of its place
_STILL_SPEED = 0.012  # short sides per frame; the slowest object makes 0.025
_QUICK_SPEED = (SPEEDS["slowly"] * SPEEDS["quickly"]) ** 0.5
_LARGE = (SIZES["small"] * SIZES["large"]) ** 0.5  # radius / short side
_RADII = (0.1, 0.3)  # radius / short side beyond which a size is no size of the world
_STRAIGHT = 0.02  # tolerated distance from a straight, even track, in short sides
_REACH = 2  # frames on either side that a local velocity is fitted to
_FIT_STEPS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class ObjectReading:
    """One object as read. An attribute that cannot be read is None.

    Per frame, None where the object is unreadable: ``positions``, its centre (x, y) in pixels,
    and ``velocities``, pixels per frame on the screen, the slope of the positions over up to two
    frames on either side. ``track`` is the bare centroid of what is visible, without any shape.
    """

    colour: str
    shape: str | None
    size: str | None  # a key of SIZES
    direction: str | None  # a key of DIRECTIONS, STILL, or None (an image, or too few frames)
    speed: str | None  # a key of SPEEDS; None when still, too
    match: float  # intersection over union with the template of ``shape``
    area: float  # pixels, the largest over the frames
    radius: float  # pixels
    track: tuple[Point | None, ...]
    positions: tuple[Point | None, ...]
    velocities: tuple[Point | None, ...]
    straight: bool  # False when the object changed its course (a bounce, a collision)

    @property
    def readable(self) -> float:
        """Fraction of the frames in which the object can be read."""
        return sum(place is not None for place in self.positions) / len(self.positions)


@dataclass(frozen=True)
class Reading:
    """What the clip shows; ``objects`` is empty when it is unreadable. Largest object first."""

    objects: tuple[ObjectReading, ...]
    background: str
    camera: Point | None  # pixels per frame; None without a visible pattern

    @property
    def counts(self) -> tuple[int, ...]:
        """How many objects can be read, per frame."""
        places = zip(*(item.positions for item in self.objects), strict=True)
        return tuple(sum(place is not None for place in frame) for frame in places)


@dataclass(frozen=True)
class Verdict:
    """Which attributes are right for every object that was asked for.

    ``count`` is about the clip: as many objects as were asked for, no more.
    """

    shape: bool
    colour: bool
    size: bool
    direction: bool
    speed: bool
    count: bool

    @property
    def right(self) -> bool:
        """Every attribute of every object right, whatever else there may be to see."""
        return self.shape and self.colour and self.size and self.direction and self.speed


ATTRIBUTES: tuple[str, ...] = tuple(field.name for field in fields(Verdict))


def read(video: torch.Tensor) -> Reading:
    """Read a clip, float [3, T, H, W] in [-1, 1]."""
    if video.dim() != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"video: expected [3, T, H, W], got {tuple(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise ValueError("video: expected finite values")
    pixels = (video.detach().cpu().double().permute(1, 2, 3, 0).numpy() + 1) / 2
    side = min(pixels.shape[1:3])
    base, amount, residual = _mixtures(pixels)
    label = residual.argmin(1)
    alphas, covered = {}, np.zeros(label.shape, dtype=bool)
    for number, colour in enumerate(COLOURS):
        alpha = np.where((label == number) & (residual[:, number] < 0.3), amount[:, number], 0.0)
        core = (alpha * (alpha > 0.5)).sum((1, 2))
        if (core > _MIN_AREA * side**2).sum() >= max(1, min(3, len(core) // 3)):
            alphas[colour] = np.where(alpha > 0.12, alpha, 0.0)
            covered |= alpha > 0.12
    largest = max((alpha.sum((1, 2)).max() for alpha in alphas.values()), default=0.0)
    kept = {c: alpha for c, alpha in alphas.items() if alpha.sum((1, 2)).max() >= 0.12 * largest}
    camera = _camera(pixels.mean(-1), covered)
    objects = []
    for colour, alpha in kept.items():
        others = [other > 0.5 for name, other in kept.items() if name != colour]
        free = ~np.any(others, axis=0) if others else np.ones(alpha.shape, dtype=bool)
        objects.append(_object(colour, alpha, free, side, camera))
    names = list(BACKGROUNDS)
    distance = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - np.median(base, 0), axis=-1)
    ordered = tuple(sorted(objects, key=lambda item: -item.area))
    return Reading(ordered, names[int(distance.argmin())], camera)


def _mixtures(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pixels [T, H, W, 3] -> background [T, 3]; and, for every palette colour, [T, colours, H, W]:
    its best share in every pixel, and the distance of that mixture from the pixel."""
    border = [pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]]
    base = np.median(np.concatenate(border, axis=1), axis=1)
    away = np.array(list(COLOURS.values()))[None] - base[:, None]
    offset = pixels - base[:, None, None]
    along = away @ offset.reshape(len(pixels), -1, 3).transpose(0, 2, 1)
    along = along.reshape(*away.shape[:2], *pixels.shape[1:3])
    length = (away**2).sum(-1)[..., None, None]
    amount = np.clip(along / length, 0, 1)
    square = (offset**2).sum(-1)[:, None] - 2 * amount * along + amount**2 * length
    return base, amount, np.sqrt(np.maximum(square, 0))


def _object(
    colour: str, alpha: np.ndarray, free: np.ndarray, side: int, camera: Point | None
) -> ObjectReading:
    """``alpha`` [T, H, W] is the object's share in every pixel; ``free`` where no other is."""
    frames, height, width = alpha.shape
    area = alpha.sum((1, 2))
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    safe = np.maximum(area, 1e-9)
    centroid = np.stack(
        [(alpha * columns).sum((1, 2)) / safe, (alpha * rows[:, None]).sum((1, 2)) / safe], -1
    )
    rim = np.maximum(alpha[:, [0, -1]].max((1, 2)), alpha[:, :, [0, -1]].max((1, 2)))
    seen = area > _MIN_SEEN * area.max()
    whole = seen & (area > 0.85 * area.max()) & (rim < 0.3)
    if whole.sum() < min(3, frames):
        whole = seen & (area > 0.7 * area.max())
    large, alpha = float(np.median(area[whole])), alpha.astype(np.float32)
    tries = {
        name: _fit(name, alpha[whole], free[whole], centroid[whole], large, steps=1)
        for name in SHAPES
    }
    shape = max(tries, key=lambda name: float(tries[name].match.mean()))
    fit = _fit(shape, alpha, free, centroid, large, steps=_FIT_STEPS)
    match = float(fit.match[whole].mean())
    good = seen & (fit.match >= _MIN_MATCH) & (fit.visible >= _MIN_SEEN)
    if match < _MIN_MATCH:
        good[:] = False
    # Something that is no shape of the world still moves somewhere: its centroid tells.
    known = good.sum() >= max(2, whole.sum() // 2)
    velocity, straight = (
        _course(fit.centre, good, side) if known else _course(centroid, whole, side)
    )
    if velocity is not None and camera is not None:
        velocity = velocity + np.array(camera)
    direction, speed = _words_of(velocity, side)
    relative = fit.radius / side
    sized = match >= _MIN_MATCH and _RADII[0] <= relative <= _RADII[1]
    return ObjectReading(
        colour,
        shape if match >= _MIN_MATCH else None,
        ("large" if relative > _LARGE else "small") if sized else None,
        direction,
        speed,
        match,
        float(area.max()),
        fit.radius,
        _points(centroid, seen),
        _points(fit.centre, good),
        _points(*_velocities(fit.centre, good)),
        straight,
    )


@dataclass(frozen=True)
class _Fit:
    """A shape's template in every frame: centres [T, 2], overlap [T], visible fraction [T]."""

    radius: float
    centre: np.ndarray
    match: np.ndarray
    visible: np.ndarray


def _fit(
    shape: str, alpha: np.ndarray, free: np.ndarray, centroid: np.ndarray, area: float, steps: int
) -> _Fit:
    """Gauss-Newton on sum((alpha - template)^2) over the free pixels, from the centroid."""
    radius = float(np.sqrt(area / _AREA[shape]))
    centre = centroid - np.array([0.0, _DROP[shape] * radius])
    for _ in range(steps):
        template = coverage(shape, radius, centre, *alpha.shape[1:])
        down, right = (-slope * free for slope in np.gradient(template, axis=(1, 2)))
        error = alpha - template
        a, b, c = (right**2).sum((1, 2)) + 1e-6, (right * down).sum((1, 2)), (down**2).sum((1, 2))
        u, v = (right * error).sum((1, 2)), (down * error).sum((1, 2))
        determinant = np.maximum(a * (c + 1e-6) - b * b, 1e-9)
        step = np.stack([(c * u - b * v) / determinant, (a * v - b * u) / determinant], -1)
        centre = centre + np.clip(step, -0.5 * radius, 0.5 * radius)
    template = coverage(shape, radius, centre, *alpha.shape[1:]) * free
    union = np.maximum(np.maximum(alpha, template).sum((1, 2)), 1e-9)
    visible = template.sum((1, 2)) / max(_AREA[shape] * radius**2, 1e-9)
    return _Fit(radius, centre, np.minimum(alpha, template).sum((1, 2)) / union, visible)


def _points(values: np.ndarray, good: np.ndarray) -> tuple[Point | None, ...]:
    return tuple(
        (float(x), float(y)) if usable else None
        for (x, y), usable in zip(values, good, strict=True)
    )


def _velocities(centre: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [T, 2] of the readable positions around every frame, and where there is one."""
    frames = len(good)
    found, usable = np.zeros((frames, 2)), np.zeros(frames, dtype=bool)
    for frame in np.flatnonzero(good):
        near = np.arange(max(0, frame - _REACH), min(frames, frame + _REACH + 1))
        near = near[good[near]]
        if len(near) >= 2:
            found[frame], _ = _line(near, centre[near])
            usable[frame] = True
    return found, usable


def _course(points: np.ndarray, usable: np.ndarray, side: int) -> tuple[np.ndarray | None, bool]:
    """Velocity of the longest straight beginning of the track, and whether that is all of it."""
    frames = np.flatnonzero(usable)
    if len(frames) < 2:
        return None, True
    used = points[frames]
    for end in range(len(frames), 1, -1):
        slope, error = _line(frames[:end], used[:end])
        if end == 2 or error <= _STRAIGHT * side:
            break
    straight = end == len(frames)
    if not straight and end > 2:  # the tolerance may have let in a first frame after the turn
        slope, _ = _line(frames[: end - 1], used[: end - 1])
    return slope, straight


def _line(time: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float]:
    """Slope [2] of the least-squares line through points [n, 2], and its largest error."""
    centred = (time - time.mean())[:, None]
    slope = (centred * points).sum(0) / (centred**2).sum()
    return slope, float(np.abs(points - points.mean(0) - centred * slope).max())


def _words_of(velocity: np.ndarray | None, side: int) -> tuple[str | None, str | None]:
    """(direction, speed) in the world's words."""
    if velocity is None:
        return None, None
    pace = float(np.linalg.norm(velocity)) / side
    if pace < _STILL_SPEED:
        return STILL, None
    octant = round(float(np.arctan2(velocity[1], velocity[0])) / (np.pi / 4)) % 8
    return tuple(DIRECTIONS)[octant], "quickly" if pace > _QUICK_SPEED else "slowly"


def _camera(grey: np.ndarray, covered: np.ndarray) -> Point | None:
    """Camera velocity from the least-squares motion of the uncovered background."""
    if len(grey) < 2:
        return None
    before, after = grey[:-1], grey[1:]
    mean = (before + after) / 2
    down, right = np.gradient(mean, axis=(1, 2))
    free = ~(dilate(covered[:-1]) | dilate(covered[1:]))
    free[:, [0, -1]] = False
    free[:, :, [0, -1]] = False
    gx, gy, change = right[free], down[free], (after - before)[free]
    if len(gx) < 16 or float(np.mean(gx**2 + gy**2)) < 1e-5:
        return None
    motion, *_ = np.linalg.lstsq(np.stack([gx, gy], -1), -change, rcond=None)
    return float(-motion[0]), float(-motion[1])


def dilate(mask: np.ndarray, reach: int = 2) -> np.ndarray:
    """A mask [T, H, W] grown by a square of ``reach`` pixels on every side."""
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (reach, reach)
        wide, length = np.pad(mask, pad), mask.shape[axis]
        shifts = [wide.take(range(i, i + length), axis) for i in range(2 * reach + 1)]
        mask = np.any(shifts, axis=0)
    return mask


def judge(reading: Reading, truth: Scene | str | Sequence[Wanted]) -> Verdict:
    """Compare a reading with a scene, a prompt or a list of wanted objects.

    What the truth leaves open counts as right: a scene leaves nothing open, a short caption the
    size and the speed. Several objects are compared in the order of objects that makes most
    attributes right.
    """
    if isinstance(truth, Scene):
        wanted: Sequence[Wanted] = [_wanted(truth, number) for number in range(len(truth.objects))]
    else:
        wanted = parse(truth) if isinstance(truth, str) else truth
    if not wanted:
        raise ValueError(f"truth: expected at least one object, got {truth!r}")
    best, _ = match_up(reading, wanted)
    return Verdict(*best, count=len(reading.objects) == len(wanted))


def _wanted(scene: Scene, number: int) -> Wanted:
    """All that a clip of the scene shows of one object."""
    item = scene.objects[number]
    moving = scene.frames > 1
    speed = item.speed if moving and item.direction != STILL else None
    return Wanted(item.shape, item.colour, item.direction if moving else None, item.size, speed)


Rights = tuple[bool, bool, bool, bool, bool]


def match_up(
    reading: Reading, wanted: Sequence[Wanted]
) -> tuple[Rights, tuple[ObjectReading | None, ...]]:
    """Which read object stands for each wanted one, so that most attributes are right.

    Returns (shape, colour, size, direction, speed) right for all of them, and the objects.
    """
    pairings = _pairings(list(wanted), list(reading.objects))
    return max(pairings, key=lambda pairing: sum(pairing[0]))


def _pairings(
    wanted: list[Wanted], objects: list[ObjectReading]
) -> list[tuple[Rights, tuple[ObjectReading | None, ...]]]:
    if not wanted:
        return [((True,) * 5, ())]
    if not objects:
        return [((False,) * 5, (None,) * len(wanted))]
    want, found = wanted[0], []
    for number, item in enumerate(objects):
        here = (
            want.shape in (None, item.shape), want.colour in (None, item.colour),
            want.size in (None, item.size), want.direction in (None, item.direction),
            want.speed in (None, item.speed),
        )  # fmt: skip
        for rest, others in _pairings(wanted[1:], objects[:number] + objects[number + 1 :]):
            shape, colour, size, direction, speed = (
                a and b for a, b in zip(here, rest, strict=True)
            )
            found.append(((shape, colour, size, direction, speed), (item, *others)))
    return found
