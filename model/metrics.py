"""What is measured on clips, as pure functions of readings, positions and pixels.

Positions are float64 [T, 2], (x, y) in pixels, NaN in frames where the object is unreadable. A
clip that cannot be read is wrong, never left out; None means that a metric asks nothing of a clip
(no event, no motion to keep), and such clips are counted out openly by ``n``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.grammar import BACKGROUNDS, DIRECTIONS, SPEEDS, STILL, Wanted
from model.oracle import ObjectReading, Reading, dilate, match_up

READABLE = 0.95  # of the frames
DISTANCE = (0.7, 1.3)  # of the prompt's
CHANGE = (0.5, 1.5)  # of the clip's own
_Z = 1.959964
_REACH = 3  # frames on either side of a seam that a velocity is fitted to
_MOVES = 0.012  # short sides per frame below which nothing moves, the oracle's own limit
_MOST_DB = 60.0
_DIFFERS = 0.15  # from the background, in [0, 1], where a pixel belongs to an object


@dataclass(frozen=True)
class Estimate:
    """A rate or a mean with its 95% interval over ``n`` clips."""

    value: float
    low: float
    high: float
    n: int

    def json(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in vars(self).items()}


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a rate (Wilson 1927)."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right: expected 0 to {count} of at least 1, got {right}")
    rate, z = right / count, _Z
    middle = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    low, high = (middle - spread) / below, (middle + spread) / below
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def rate(flags: Sequence[bool | None]) -> Estimate | None:
    """Rate and Wilson interval of the flags that are not None; None without any."""
    asked = [bool(flag) for flag in flags if flag is not None]
    if not asked:
        return None
    return Estimate(sum(asked) / len(asked), *wilson(sum(asked), len(asked)), len(asked))


def mean(values: Sequence[float | None]) -> Estimate | None:
    """Mean and its normal interval over the values that are not None; None without any."""
    asked = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(asked):
        return None
    spread = _Z * float(asked.std(ddof=1)) / math.sqrt(len(asked)) if len(asked) > 1 else 0.0
    middle = float(asked.mean())
    return Estimate(middle, middle - spread, middle + spread, len(asked))


# --- one object ------------------------------------------------------------------------------


def places(item: ObjectReading | None, frames: int) -> np.ndarray:
    """Positions [T, 2] of a read object; NaN where it is unreadable, or not there at all."""
    found = np.full((frames, 2), np.nan)
    for frame, place in enumerate(item.positions if item is not None else ()):
        if place is not None:
            found[frame] = place
    return found


def slope(points: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """Velocity [2] of the least-squares line through the readable points, if there are two."""
    good = ~np.isnan(points[:, 0])
    if good.sum() < 2:
        return None
    centred = (times[good] - times[good].mean())[:, None]
    return (centred * points[good]).sum(0) / (centred**2).sum()


def pace(points: np.ndarray, direction: str | None) -> float | None:
    """Pixels per frame covered in ``direction`` from the first to the last readable frame.

    STILL: length of the mean velocity. None: along the way, whatever its turns.
    """
    good = np.flatnonzero(~np.isnan(points[:, 0]))
    if len(good) < 2:
        return None
    if direction == STILL:
        drift = slope(points, np.arange(len(points), dtype=np.float64))
        return None if drift is None else float(np.linalg.norm(drift))
    if direction is not None:
        way = points[good[-1]] - points[good[0]]
        return float(way @ np.array(DIRECTIONS[direction])) / int(good[-1] - good[0])
    steps = np.diff(points[good], axis=0) / np.diff(good)[:, None]
    return float(np.linalg.norm(steps, axis=-1).mean())


def moved(points: np.ndarray, want: Wanted, side: int, turns: bool = False) -> bool:
    """Whether the distance travelled is within DISTANCE of what the prompt asks for.

    A prompt without a speed allows every speed of the world, one that says "still" none.
    turns: the object is meant to change its course, so the way counts, not how far it leads.
    """
    turns = turns and want.direction != STILL
    found = pace(points, None if turns else want.direction)
    if found is None:
        return False
    if want.direction == STILL:
        return found / side < _MOVES
    speeds = [SPEEDS[want.speed]] if want.speed else sorted(SPEEDS.values())
    return DISTANCE[0] * speeds[0] <= found / side <= DISTANCE[1] * speeds[-1]


def joint(
    reading: Reading,
    wanted: Sequence[Wanted],
    frames: int,
    side: int,
    turns: bool = False,
    readable: float = READABLE,
) -> dict[str, bool | None]:
    """Every attribute of the clip, and ``all`` of them jointly.

    Besides the verdict on the attributes: ``count``, as many objects as asked for; ``readable``,
    all of them in a fraction ``readable`` of the frames; ``motion``, see :func:`moved` (None for
    an image). An attribute that the prompt leaves open is None, too.
    """
    rights, objects = match_up(reading, wanted)
    names = ("shape", "colour", "size", "direction", "speed")
    said = [any(getattr(want, name) is not None for want in wanted) for name in names]
    if frames == 1:
        said[3] = said[4] = False
    flags: dict[str, bool | None] = {
        name: right if asked else None
        for name, right, asked in zip(names, rights, said, strict=True)
    }
    flags["count"] = len(reading.objects) == len(wanted)
    flags["readable"] = all(item is not None and item.readable >= readable for item in objects)
    flags["motion"] = None
    if frames > 1:
        pan = np.arange(frames)[:, None] * np.array(reading.camera or (0.0, 0.0))
        flags["motion"] = all(
            moved(places(item, frames) + pan, want, side, turns)
            for item, want in zip(objects, wanted, strict=True)
        )
    flags["all"] = all(flag for flag in flags.values() if flag is not None)
    return flags


# --- seams -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seam:
    """The state across a seam against the clip's own change.

    position: length of the step over the seam / median step elsewhere.
    velocity: velocity after it, along the velocity before it / the latter's length.
    right: both within CHANGE, and the velocity turned no further than that to the side.
    """

    position: float
    velocity: float
    right: bool


def seam(points: np.ndarray, at: int, side: int) -> Seam | None:
    """The seam between frames ``at - 1`` and ``at``; None if what can be read does not move, or
    cannot be read around the seam."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=-1)
    own = np.delete(steps, at - 1)
    own = own[~np.isnan(own)]
    times = np.arange(len(points), dtype=np.float64)
    first, last = max(0, at - _REACH), min(len(points), at + _REACH)
    before = slope(points[first:at], times[first:at])
    after = slope(points[at:last], times[at:last])
    if not len(own) or before is None or after is None or np.isnan(steps[at - 1]):
        return None
    step, speed = float(np.median(own)), float(np.linalg.norm(before))
    if min(step, speed) < _MOVES * side:
        return None
    position = float(steps[at - 1]) / step
    velocity = float(after @ before) / speed**2
    turned = float(np.linalg.norm(after - before)) / speed
    right = CHANGE[0] <= position <= CHANGE[1] and turned <= CHANGE[1] - 1
    return Seam(position, velocity, right)


def wrap(points: np.ndarray, side: int) -> Seam | None:
    """The seam of a loop, where its last frame is followed by its first."""
    return seam(np.concatenate([points, points]), len(points), side)


# --- pixels ----------------------------------------------------------------------------------


def object_mask(video: Tensor, background: str) -> np.ndarray:
    """bool [T, H, W]: where a clip [3, T, H, W] on a plain background shows anything else."""
    base = torch.tensor(BACKGROUNDS[background], dtype=video.dtype)[:, None, None, None]
    return (((video + 1) / 2 - base).abs().amax(0) > _DIFFERS).numpy()


def psnr(made: Tensor, true: Tensor, mask: np.ndarray | None = None) -> float:
    """PSNR in dB of clips in [-1, 1], over the pixels of a mask [T, H, W]; at most 60."""
    error = (made.double() - true.double()).square().mean(0)
    if mask is not None:
        error = error[torch.from_numpy(mask)]
    return min(_MOST_DB, 10 * math.log10(4 / max(float(error.mean()), 1e-12)))


def masked_psnr(made: Tensor, true: Tensor, background: str, frames: Sequence[int]) -> float:
    """PSNR of ``frames`` around the object: on the union of the true and the predicted mask,
    dilated by 2 pixels. The plain background, which anybody predicts, does not count."""
    index = list(frames)
    made, true = made[:, index], true[:, index]
    mask = dilate(object_mask(made, background) | object_mask(true, background))
    return psnr(made, true, mask if mask.any() else None)


# --- events ----------------------------------------------------------------------------------
# Each returns None when the event did not happen in the clip, else whether it went right.


def bounced(points: np.ndarray, radius: float, size: tuple[int, int]) -> bool | None:
    """A turn at a wall: mirrored there, at DISTANCE of the speed before. size: (height, width)."""
    steps = np.diff(points, axis=0)
    for axis, length in ((0, size[1]), (1, size[0])):
        for frame in range(1, len(steps) - 1):
            before, after = steps[frame - 1, axis], steps[frame + 1, axis]
            near = points[frame : frame + 2, axis]
            gap = np.minimum(near, length - near).min() - radius
            if before * after < 0 and min(abs(before), abs(after)) > 0.4 and gap < radius:
                other = steps[[frame - 1, frame + 1], 1 - axis]
                ratio = abs(after / before)
                sideways = abs(other[1] - other[0]) <= 0.5 * max(abs(before), abs(other[0]))
                return bool(
                    DISTANCE[0] <= ratio <= DISTANCE[1] and sideways and gap > -0.5 * radius
                )
    return None


def occluded(a: ObjectReading, b: ObjectReading, frames: int) -> bool | None:
    """Two objects overlapped and parted again. Right: both kept their ways through it."""
    pa, pb = _bridged(places(a, frames)), _bridged(places(b, frames))
    reach = a.radius + b.radius
    distance = np.linalg.norm(pa - pb, axis=-1) / reach
    together = np.flatnonzero(distance < 0.6)
    if not len(together):
        return None
    first, last = int(together[0]), int(together[-1])
    apart = distance > 0.9
    if not apart[:first].any() or not apart[last:].any():
        return None
    return a.straight and b.straight and a.shape is not None and b.shape is not None


def collided(a: ObjectReading, b: ObjectReading, frames: int) -> bool | None:
    """Two objects met, and at least one changed its course there.

    Right: momentum is kept within 30% of what moves, and energy within CHANGE (discs, masses
    proportional to the squared radius).
    """
    pa, pb = places(a, frames), places(b, frames)
    distance = np.linalg.norm(pa - pb, axis=-1) / (a.radius + b.radius)
    if np.isnan(distance).all():
        return None
    meet = int(np.nanargmin(distance))
    if distance[meet] > 1.25 or not 2 <= meet <= frames - 3:
        return None
    times = np.arange(frames, dtype=np.float64)
    past, next_ = slice(max(0, meet - 3), meet), slice(meet + 1, meet + 4)
    va, vb = slope(pa[past], times[past]), slope(pb[past], times[past])
    wa, wb = slope(pa[next_], times[next_]), slope(pb[next_], times[next_])
    if va is None or vb is None or wa is None or wb is None:
        return None
    before, after = np.stack([va, vb]), np.stack([wa, wb])
    mass = np.array([[a.radius**2], [b.radius**2]])
    moving = float((mass[:, 0] * np.linalg.norm(before, axis=-1)).sum())
    if float((mass[:, 0] * np.linalg.norm(after - before, axis=-1)).max()) < 0.3 * moving:
        return None
    kept = float(np.linalg.norm((mass * (after - before)).sum(0))) <= 0.3 * moving
    energy = float((mass * after**2).sum() / max((mass * before**2).sum(), 1e-9))
    return kept and CHANGE[0] <= energy <= CHANGE[1]


def _bridged(points: np.ndarray) -> np.ndarray:
    """Unreadable frames between readable ones, filled in linearly."""
    good = ~np.isnan(points[:, 0])
    if good.sum() < 2:
        return points
    times = np.arange(len(points))
    return np.stack([np.interp(times, times[good], points[good, k]) for k in (0, 1)], -1)
