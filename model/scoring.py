"""One row of the evaluation: every metric of every provider, and whether a trick passes it.

Providers are the generated clips (as decoded, and with known pixels pasted back), the ceilings
(the true clip, its round trip through the VAE) and the floors (see ``model.suites.floors_of``;
"shuffled" judges true clips by another item's prompt). A metric is void in a row when a floor
passes it there: when the floor reaches the target, or cannot be told from the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from model import metrics
from model.metrics import Estimate, joint, masked_psnr, places, psnr
from model.oracle import ObjectReading, Reading, match_up, read
from model.suites import Item, Suite

Values = dict[str, "bool | float | None"]

TARGETS: Mapping[str, Mapping[str, float]] = {
    "one_object": {"all": 0.9},
    "held_out": {"all": 0.8},
    "image_to_video": {"first_frame_db": -1.0},
    "fill": {"gain_db": 2.0},
    "super_resolution": {"gain_db": 2.0},
    "two_objects": {"all": 0.6},
}
"""What is aimed at, by row and metric; "at least"."""

KEPT = 0.5  # radii by which an edited object may leave its way
FIRST_FRAME_DB = -1.0  # against the VAE's round trip


def measure(item: Item, clip: Tensor, reading: Reading, trip: Tensor) -> Values:
    """All metrics of one whole clip. trip: the item's round trip through the VAE."""
    suite, frames = item.suite, item.suite.frames
    side = min(suite.size)
    turns = suite.mode == "loop" or suite.kind in ("bounce", "collide")
    hidden = 0.5 if suite.kind == "occlude" else metrics.READABLE
    values: Values = {**joint(reading, item.wanted, frames, side, turns, hidden)}
    _, objects = match_up(reading, item.wanted)
    points = places(objects[0], frames)
    if suite.mode == "loop":
        values |= _seams([metrics.wrap(points, side)], bool(values["all"]))
    elif suite.seams:
        values |= _seams(
            [metrics.seam(points, at, side) for at in suite.seams], bool(values["all"])
        )
    if suite.mode == "image_to_video":
        first = psnr(clip[:, :1], item.video[:, :1]) - psnr(trip[:, :1], item.video[:, :1])
        values["first_frame_db"] = first
        values["first_frame_and_all"] = bool(values["all"]) and first >= FIRST_FRAME_DB
    if suite.mode in ("fill", "super_resolve", "connect"):
        values["masked_db"] = _masked(item, clip)
    if item.source is not None:
        away = np.linalg.norm(points - np.array(item.scene.objects[0].path), axis=-1)
        read_at = ~np.isnan(away)
        near = np.median(away[read_at]) if read_at.any() else np.inf
        values["motion_kept"] = bool(near <= KEPT * item.scene.objects[0].radius)
        values["edited"] = bool(values["all"]) and values["motion_kept"]
    if suite.kind in ("bounce", "occlude", "collide"):
        right = _event(suite, objects, points, frames)
        values["event_happened"] = right is not None
        values["event_right"] = right
    return values


def _seams(seams: Sequence[metrics.Seam | None], readable: bool) -> Values:
    """A clip that cannot be read or does not move at its seam has no right seam."""
    seen = [found for found in seams if found is not None]
    right = len(seen) == len(seams) and all(found.right for found in seen)
    return {
        "seam": right,
        "seam_and_all": right and readable,
        "seam_position": float(np.mean([found.position for found in seen])) if seen else None,
        "seam_velocity": float(np.mean([found.velocity for found in seen])) if seen else None,
    }


def _masked(item: Item, clip: Tensor) -> float:
    return masked_psnr(clip, item.video, item.scene.background, item.suite.unknown)


def _event(
    suite: Suite, objects: Sequence[ObjectReading | None], points: np.ndarray, frames: int
) -> bool | None:
    first = objects[0]
    if first is None:
        return None
    if suite.kind == "bounce":
        return metrics.bounced(points, first.radius, suite.size)
    second = objects[1]
    if second is None:
        return None
    happened = metrics.occluded if suite.kind == "occlude" else metrics.collided
    return happened(first, second, frames)


def score(
    items: Sequence[Item],
    generated: Mapping[str, Sequence[Tensor]],
    trips: Sequence[Tensor],
    floors: Mapping[str, Sequence[Tensor]],
) -> dict[str, Any]:
    """The metrics of a row, as plain JSON types.

    generated: whole clips by provider ("generated", "pasted"). trips: round trips. floors: whole
    clips by floor.
    """
    suite = items[0].suite
    true = [item.video for item in items]
    readings = [read(clip) for clip in true]
    found: dict[str, list[Values]] = {
        "true": _all(items, true, readings, trips),
        "vae": _all(items, trips, [read(clip) for clip in trips], trips),
    }
    for name, clips in {**generated, **floors}.items():
        found[name] = _all(items, clips, [read(clip) for clip in clips], trips)
    if len(items) > 1:  # every item is asked for what the next true clip shows
        rest = [*range(1, len(items)), 0]
        found["shuffled"] = [
            measure(item, true[k], readings[k], trips[n])
            for n, (item, k) in enumerate(zip(items, rest, strict=True))
        ]
    if "crossfade" in found and suite.mode in ("fill", "super_resolve", "connect"):
        for values in found.values():
            for value, linear in zip(values, found["crossfade"], strict=True):
                value["gain_db"] = _difference(value["masked_db"], linear["masked_db"])
    names = list(found["true"][0])
    tricks = [name for name in found if name in ("shuffled", *floors)]
    return {
        name: _metric(suite, name, found, list(generated), tricks)
        for name in names
        if any(values[name] is not None for part in found.values() for values in part)
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _all(
    items: Sequence[Item],
    clips: Sequence[Tensor],
    readings: Sequence[Reading],
    trips: Sequence[Tensor],
) -> list[Values]:
    parts = zip(items, clips, readings, trips, strict=True)
    return [measure(item, clip, reading, trip) for item, clip, reading, trip in parts]


def unit_of(name: str) -> str:
    """ "dB" (more is better), "ratio" (one is best), or "rate"."""
    if name.endswith("_db"):
        return "dB"
    return "ratio" if name in ("seam_position", "seam_velocity", "speed_ratio") else "rate"


def estimate(name: str, values: Sequence[bool | float | None]) -> Estimate | None:
    """Rate with its Wilson interval, or mean with its normal interval."""
    if unit_of(name) == "rate":
        return metrics.rate([None if value is None else bool(value) for value in values])
    return metrics.mean([None if value is None else float(value) for value in values])


def passes(unit: str, floor: Estimate, ceiling: Estimate | None, target: float | None) -> bool:
    """Whether a floor reaches the target or cannot be told from the ceiling."""
    if unit == "ratio":
        return metrics.CHANGE[0] <= floor.value <= metrics.CHANGE[1]
    if target is not None and floor.value >= target:
        return True
    return ceiling is not None and floor.high >= ceiling.low


def _metric(
    suite: Suite,
    name: str,
    found: Mapping[str, Sequence[Values]],
    makers: Sequence[str],
    tricks: Sequence[str],
) -> dict[str, Any]:
    unit, target = unit_of(name), TARGETS.get(suite.name, {}).get(name)
    estimates = {who: estimate(name, [value[name] for value in found[who]]) for who in found}
    # A true clip has 60 dB by definition: the ceiling of pixels is the round trip.
    ceiling = estimates["vae" if unit == "dB" else "true"]
    by = []
    for trick in tricks:
        floor = estimates[trick]
        if floor is not None and passes(unit, floor, ceiling, target):
            by.append(trick)
    best = max((e.high for trick in tricks if (e := estimates[trick])), default=None)
    row: dict[str, Any] = {"unit": unit, "target": target}
    row |= {who: _json(estimates[who]) for who in makers}
    row["ceilings"] = {who: _json(estimates[who]) for who in ("true", "vae")}
    row["floors"] = {trick: _json(estimates[trick]) for trick in tricks}
    row["void"], row["passed_by"] = bool(by), by
    ours = estimates[makers[0]] if makers else None
    if unit != "ratio" and ours is not None and best is not None:
        row["above_floors"] = ours.low > best
    return row


def _json(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else value.json()
