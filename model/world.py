"""The procedural world: scenes of moving shapes, rendered with exact anti-aliasing.

A :class:`Scene` holds the truth of every object in every frame; :func:`render` draws it;
:func:`captions` describes it. Clip ``i`` of split ``s`` is a pure function of ``(seed, s, i)``.

Coordinates are pixels, x to the right and y down, pixel (row i, column j) has its centre at
(j + 0.5, i + 0.5). Lengths scale with the short side of the canvas.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from model.config import WORLDS, Weights, WorldConfig
from model.grammar import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZES,
    SPEEDS,
    STILL,
    VOCABULARY,
    Wanted,
    captions,
    parse,
    unknown_words,
    words,
)

__all__ = [
    "BACKGROUNDS", "COLOURS", "DIRECTIONS", "HELD_OUT", "KINDS", "SHAPES", "SIZES", "SPEEDS",
    "SPLITS", "STILL", "VOCABULARY", "Clip", "Event", "ObjectTruth", "Scene", "Wanted", "captions",
    "clip", "parse", "render", "sample_scene", "unknown_words", "visibility", "words",
]  # fmt: skip

KINDS: tuple[str, ...] = (
    "one", "still", "bounce", "exit", "two", "three", "occlude", "collide", "camera", "image",
)  # fmt: skip
SPLITS: tuple[str, ...] = ("train", "val", "held_out")
_TRIES = 2000
_ROUNDS = 20
_SUBSTEPS = 8


@dataclass(frozen=True)
class ObjectTruth:
    """One object: its words, its radius in pixels, and its centre on the screen in every frame."""

    shape: str
    colour: str
    size: str
    direction: str  # of the first frame; a key of DIRECTIONS, or STILL
    speed: str  # a key of SPEEDS; meaningless when still
    radius: float
    path: tuple[tuple[float, float], ...]  # (x, y) per frame
    headings: tuple[str, ...]  # direction per frame, in the world (not relative to the camera)


@dataclass(frozen=True)
class Event:
    """Something that happens at ``frame`` to ``objects`` (indices into Scene.objects).

    kind: "bounce" off a wall, "exit" from the frame, "collision" of two objects, or "occlusion"
    (the object with the larger index is in front).
    """

    kind: str
    frame: int
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """The whole truth of a clip. Objects are listed from the back to the front."""

    kind: str
    frames: int
    height: int
    width: int
    objects: tuple[ObjectTruth, ...]
    events: tuple[Event, ...]
    background: str
    checkered: bool = False
    camera: str | None = None  # "left", "right", "up" or "down"
    camera_path: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Clip:
    """A rendered scene: video float32 [3, T, H, W] in [-1, 1]."""

    video: torch.Tensor
    scene: Scene
    short: str
    detailed: str


# --- sampling ---------------------------------------------------------------------------------


@dataclass
class _Body:
    """An object while its motion is simulated."""

    radius: float
    position: np.ndarray
    velocity: np.ndarray


def clip(
    index: int, split: str = "train", seed: int = 0, config: WorldConfig | None = None
) -> Clip:
    """Clip ``index`` of ``split``: "train" and "val" never show a HELD_OUT combination,
    "held_out" shows one-object clips of nothing else."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    scene = sample_scene(rng, config, held_out=split == "held_out")
    short, detailed = captions(scene)
    return Clip(render(scene), scene, short, detailed)


def sample_scene(
    rng: np.random.Generator,
    config: WorldConfig | None = None,
    *,
    kind: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    wanted: Wanted | None = None,
    held_out: bool = False,
) -> Scene:
    """Draw a scene from the mix of ``config`` (default: WORLDS["tiny"]).

    ``kind``, ``size`` (height, width), ``frames`` and ``wanted`` (of the first object) fix what
    would be drawn otherwise. ``held_out=True`` draws one moving object of a HELD_OUT
    combination; otherwise no object ever has one, unless ``wanted`` asks for it.
    """
    config = WORLDS["tiny"] if config is None else config
    count = int(_choose(rng, config.frames)) if frames is None else frames
    if count < 1:
        raise ValueError(f"frames: expected at least 1, got {count}")
    if held_out and frames is None:
        moving = tuple(pair for pair in config.frames if pair[0] > 1) or ((9, 1.0),)
        count = int(_choose(rng, moving))
    height, width = _choose(rng, config.sizes) if size is None else size
    if held_out:
        shape, colour, direction = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        wanted, kind = Wanted(shape, colour, direction), "one"
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if kind is not None and (kind == "image") != (count == 1):
        raise ValueError(f"kind: {kind!r} does not go with frames={count}")
    background = str(_choose(rng, config.backgrounds))
    # A kind drawn from the mix can be impossible (no exit within five frames): draw another.
    rounds = 1 if kind is not None or count == 1 else _ROUNDS
    for _ in range(rounds):
        drawn = kind or ("image" if count == 1 else str(_choose(rng, config.kinds)))
        for _ in range(_TRIES // rounds):
            scene = _attempt(rng, config, drawn, count, height, width, background, wanted)
            if scene is not None and (wanted is not None or not _shows_held_out(scene)):
                return scene
    raise ValueError(
        f"kind: no scene of kind {kind or 'any'} with {count} frames found that fits "
        f"{height}x{width}"
    )


def _choose(rng: np.random.Generator, weights: Weights):  # type: ignore[no-untyped-def]
    probability = np.array([weight for _, weight in weights], dtype=np.float64)
    return weights[int(rng.choice(len(weights), p=probability / probability.sum()))][0]


def _shows_held_out(scene: Scene) -> bool:
    return any(
        (item.shape, item.colour, heading) in HELD_OUT
        for item in scene.objects
        for heading in set(item.headings)
    )


def _attempt(
    rng: np.random.Generator, config: WorldConfig, kind: str, frames: int, height: int, width: int,
    background: str, wanted: Wanted | None,
) -> Scene | None:  # fmt: skip
    """One draw of everything random; None when it does not show what ``kind`` promises."""
    count = {"two": 2, "occlude": 2, "collide": 2, "three": 3}.get(kind, 1)
    if kind == "image":
        count = 2 if rng.random() < 0.1 else 1
    side = min(height, width)
    colours = [str(name) for name in rng.permutation(list(COLOURS))[:count]]
    labels: list[tuple[str, str, str, str, str]] = []
    bodies: list[_Body] = []
    for number in range(count):
        want = wanted if wanted is not None and number == 0 else Wanted()
        shape = want.shape or str(rng.choice(SHAPES))
        colour = want.colour or colours[number]
        small = count > 1 or rng.random() < config.small
        size = want.size or ("small" if small else "large")
        still = kind in ("still", "image") or (kind == "camera" and rng.random() < 0.5)
        direction = want.direction or (STILL if still else str(rng.choice(list(DIRECTIONS))))
        drawn = str(rng.choice(list(SPEEDS)))
        speed = want.speed or drawn
        radius = SIZES[size] * side * float(rng.uniform(0.94, 1.06))
        radius *= 0.8 if kind == "three" else 1.0
        pace = 0.0 if direction == STILL else SPEEDS[speed] * side * float(rng.uniform(0.9, 1.1))
        heading = np.array(DIRECTIONS.get(direction, (0.0, 0.0)))
        low, high = np.full(2, radius), np.array([width, height]) - radius
        if kind not in ("bounce", "exit", "collide", "camera"):  # the whole way must fit
            way = heading * pace * (frames - 1)
            low, high = np.maximum(low, low - way), np.minimum(high, high - way)
            if (low > high).any():
                return None
        start = rng.uniform(low, high)
        if kind in ("one", "exit") and rng.random() < config.central:
            middle = np.array([width, height]) / 2
            start = middle + rng.uniform(-0.08, 0.08, 2) * side
        bodies.append(_Body(radius, start, heading * pace))
        labels.append((shape, colour, size, direction, speed))
    if len({label[1] for label in labels}) < count:
        return None
    camera: str | None = None
    camera_path: np.ndarray = np.zeros((frames, 2))
    if kind == "camera":
        camera = str(rng.choice(["left", "right", "up", "down"]))
        pan = np.array(DIRECTIONS[camera]) * side * float(rng.uniform(0.02, 0.04))
        camera_path = np.arange(frames)[:, None] * pan
    walls = kind in ("bounce", "collide")
    paths, velocities, events = _simulate(bodies, frames, height, width, walls, kind == "collide")
    paths = paths - camera_path
    radii = np.array([body.radius for body in bodies])
    more = _promised(kind, paths, radii, events, height, width)
    if more is None:
        return None
    objects = tuple(
        ObjectTruth(
            *label,
            radius=body.radius,
            path=tuple((float(x), float(y)) for x, y in paths[number]),
            headings=tuple(_heading(velocity) for velocity in velocities[number]),
        )
        for number, (label, body) in enumerate(zip(labels, bodies, strict=True))
    )
    return Scene(
        kind, frames, height, width, objects, tuple(events + more), background,
        checkered=kind == "camera", camera=camera,
        camera_path=tuple((float(x), float(y)) for x, y in camera_path),
    )  # fmt: skip


def _heading(velocity: np.ndarray) -> str:
    """The nearest of the eight directions."""
    if float(np.abs(velocity).max()) < 1e-9:
        return STILL
    octant = round(math.atan2(velocity[1], velocity[0]) / (math.pi / 4)) % 8
    return tuple(DIRECTIONS)[octant]


def _simulate(
    bodies: list[_Body], frames: int, height: int, width: int, walls: bool, collide: bool
) -> tuple[np.ndarray, np.ndarray, list[Event]]:
    """Positions and velocities [objects, T, 2] and the bounces and collisions on the way."""
    events: list[Event] = []
    paths = np.zeros((len(bodies), frames, 2))
    velocities = np.zeros_like(paths)
    if not walls:
        steps = np.arange(frames)[:, None]
        for number, body in enumerate(bodies):
            paths[number] = body.position + steps * body.velocity
            velocities[number] = body.velocity
        return paths, velocities, events
    limits = np.array([width, height], dtype=np.float64)
    for frame in range(frames):
        for number, body in enumerate(bodies):
            paths[number, frame], velocities[number, frame] = body.position, body.velocity
        for _ in range(_SUBSTEPS):
            for number, body in enumerate(bodies):
                body.position = body.position + body.velocity / _SUBSTEPS
                if _bounce(body, limits):
                    events.append(Event("bounce", frame + 1, (number,)))
            if collide and _elastic(bodies[0], bodies[1]):
                events.append(Event("collision", frame + 1, (0, 1)))
    return paths, velocities, events


def _bounce(body: _Body, limits: np.ndarray) -> bool:
    """Mirror the position and the velocity at the walls; True when a wall was hit."""
    low, high = np.full(2, body.radius), limits - body.radius
    hit = ((body.position < low) & (body.velocity < 0)) | (
        (body.position > high) & (body.velocity > 0)
    )
    if not hit.any():
        return False
    wall = np.where(body.position < low, low, high)
    body.position = np.where(hit, 2 * wall - body.position, body.position)
    body.velocity = np.where(hit, -body.velocity, body.velocity)
    return True


def _elastic(a: _Body, b: _Body) -> bool:
    """Elastic impact of two discs with masses proportional to their areas."""
    offset = b.position - a.position
    distance = float(np.linalg.norm(offset))
    normal = offset / max(distance, 1e-9)
    closing = float((a.velocity - b.velocity) @ normal)
    if distance > a.radius + b.radius or closing <= 0:
        return False
    mass_a, mass_b = a.radius**2, b.radius**2
    impulse = 2 * closing / (mass_a + mass_b)
    a.velocity = a.velocity - impulse * mass_b * normal
    b.velocity = b.velocity + impulse * mass_a * normal
    return True


def _promised(
    kind: str, paths: np.ndarray, radii: np.ndarray, events: list[Event], height: int, width: int
) -> list[Event] | None:
    """Further events of an accepted draw, or None when it does not show what ``kind`` promises."""
    frames = paths.shape[1]
    low = paths.min(-1)  # distance of each centre to the left or the top wall
    room = np.minimum(low, np.minimum(width - paths[..., 0], height - paths[..., 1]))
    inside = room / radii[:, None]  # 1 = just inside, 0 = the centre is on the border
    if kind == "exit":
        gone = np.flatnonzero(inside[0] < -0.6)
        ready = bool(inside[0, : min(3, frames)].min() >= 0.5)
        return [Event("exit", int(gone[0]), (0,))] if gone.size and ready else None
    if inside.min() < (0.5 if kind in ("one", "camera") else 0.98):
        return None
    if kind == "one" and np.median(inside) < 1:
        return None
    if kind == "bounce":
        good = bool(events) and 2 <= events[0].frame <= frames - 2
        return [] if good else None
    if kind == "collide":
        first = events[0] if events else None
        shown = first is not None and first.kind == "collision" and 2 <= first.frame <= frames - 2
        return [] if shown else None
    pairs = [(i, j) for i in range(len(radii)) for j in range(i + 1, len(radii))]
    overlap = np.array(
        [np.linalg.norm(paths[i] - paths[j], axis=-1) / (radii[i] + radii[j]) for i, j in pairs]
    )
    if kind == "occlude":
        apart = overlap[0, 0] > 1.05
        hidden = np.flatnonzero(overlap[0] < 0.6)
        return [Event("occlusion", int(hidden[0]), pairs[0])] if apart and hidden.size else None
    if pairs and overlap.min() < (1.0 if kind == "three" else 1.1):
        return None
    return []


# --- rendering --------------------------------------------------------------------------------


def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.sqrt(x * x + y * y) - r


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Equilateral, pointing up, centred on its bounding box so that it fits the radius."""
    slope = np.abs(x) * (math.sqrt(3) / 2) - (y + 0.95 * r) * 0.5
    return np.maximum(slope, y - 0.75 * r)


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    arm, thin = 1.0 * r, 0.34 * r
    return np.minimum(
        np.maximum(np.abs(x) - arm, np.abs(y) - thin), np.maximum(np.abs(x) - thin, np.abs(y) - arm)
    )


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross,
}  # fmt: skip


def coverage(shape: str, radius: float, path: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fraction of each pixel covered by the shape: float32 [T, H, W], from its signed distance."""
    x = np.arange(width, dtype=np.float32) + 0.5 - path[:, 0, None].astype(np.float32)
    y = np.arange(height, dtype=np.float32) + 0.5 - path[:, 1, None].astype(np.float32)
    distance = _DISTANCE[shape](x[:, None, :], y[:, :, None], radius)
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def render(scene: Scene) -> torch.Tensor:
    """The clip: float32 [3, T, H, W] in [-1, 1]."""
    frames, height, width = scene.frames, scene.height, scene.width
    base = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    image = np.broadcast_to(base[:, None, None, None], (3, frames, height, width)).copy()
    if scene.checkered:
        image += _checks(scene)[None]
    for item in scene.objects:
        mask = coverage(item.shape, item.radius, np.array(item.path), height, width)
        colour = np.array(COLOURS[item.colour], dtype=np.float32)[:, None, None, None]
        image += mask[None] * (colour - image)
    return torch.from_numpy(np.clip(image, 0.0, 1.0) * 2.0 - 1.0)


def _checks(scene: Scene) -> np.ndarray:
    """A soft checkerboard fixed to the world, [T, H, W]: it makes the camera's motion visible."""
    camera = np.array(scene.camera_path)
    wave = 2 * math.pi / (0.5 * min(scene.height, scene.width))
    x = np.sin((np.arange(scene.width) + 0.5 + camera[:, 0, None]) * wave)
    y = np.sin((np.arange(scene.height) + 0.5 + camera[:, 1, None]) * wave)
    return (0.06 * y[:, :, None] * x[:, None, :]).astype(np.float32)


def visibility(scene: Scene) -> np.ndarray:
    """Visible area of each object in pixels, after occlusion and the frame's edge: [objects, T]."""
    masks = [
        coverage(item.shape, item.radius, np.array(item.path), scene.height, scene.width)
        for item in scene.objects
    ]
    area = np.zeros((len(masks), scene.frames))
    free = np.ones((scene.frames, scene.height, scene.width), dtype=np.float32)
    for number in reversed(range(len(masks))):
        area[number] = (masks[number] * free).sum((1, 2))
        free = free * (1 - masks[number])
    return area
