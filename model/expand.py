"""Prompt expansion: a short prompt becomes the detailed caption of a clip that fits it.

The model is trained on two captions of every clip (`model.grammar.captions`). A short prompt leaves
size, speed and background open; a detailed one names them, in the words and the order of the
world's captions. `expand` goes from one to the other by rules:

- What a prompt says is kept, in its meaning and in the order of its objects. What it leaves open is
  drawn from the mix that the small model has seen: colour, size, direction, speed, background. A
  way that is drawn fits into the clip, a colour or direction that is drawn makes no held-out
  combination, and objects that share a clip are small and of different colours.
- Nothing that happens is added: bounces, exits, collisions, a moving camera and an object in front
  are kept where they are said. A panning camera shows its motion on a checkered background.
- "standing still" has no speed, and an image (the prompt says "image of", or the clip has one frame
  and the prompt no motion) no motion at all.
- A prompt that the rules cannot read as a caption (it contradicts itself, its words stand in
  another order, or it has more than three objects) is returned as it is, synonyms resolved.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np

from model.config import WORLDS
from model.grammar import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZES,
    SPEEDS,
    VOCABULARY,
    words,
)
from model.text import Vocabulary

T = TypeVar("T")
ASPECTS = ("colour", "size", "direction", "speed", "background")
"""What can be drawn."""
MOST_OBJECTS = 3
_WORLD = WORLDS["tiny"]
_EVENTS = {"bouncing": "bouncing off the wall", "leaving": "leaving the frame"}


def _one_of(names: Collection[str]) -> str:
    return f"(?:{'|'.join(names)})"


_MOTION = (
    f"moving|standing|still|{_one_of(DIRECTIONS)}|{_one_of(SPEEDS)}"
    "|bouncing(?: off the wall)?|leaving(?: the frame)?"
)
_OBJECT = re.compile(
    rf"(?:(?:a|the) )?((?:{_one_of([*SIZES, *COLOURS])} )*)({_one_of(SHAPES)})((?: (?:{_MOTION}))*)"
)
_CAMERA = re.compile(
    r"(?:\b(?:while|and) )?(?:\b(?:the|a) )?\bcamera pans (left|right|up|down)(?![-\w])"
)
_FRONT = re.compile(rf"\bwith (?:the|a) ({_one_of(COLOURS)} {_one_of(SHAPES)}) in front")
_BACKGROUND = re.compile(
    rf"\b(?:on|with) (?:(?:a|the) )?((?:checkered )?{_one_of(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class _Object:
    """What is said of an object; None where nothing is."""

    shape: str
    colour: str | None = None
    size: str | None = None
    direction: str | None = None
    speed: str | None = None
    event: str | None = None  # a key of _EVENTS
    moving: bool = False
    still: bool = False

    @property
    def silent(self) -> bool:
        """Whether nothing is said of its motion."""
        return not (self.moving or self.still or self.event)

    def text(self) -> str:
        """In the words of a caption."""
        said = ["a", self.size, self.colour, self.shape]
        if self.still:
            said.append("standing still")
        if self.moving:
            said += ["moving", self.direction, self.speed]
        said.append(_EVENTS.get(self.event or ""))
        return " ".join(word for word in said if word)


@dataclass(frozen=True)
class _Caption:
    """A prompt, read; ``background`` with its "checkered"."""

    objects: tuple[_Object, ...]
    image: bool
    collide: bool
    camera: str | None
    front: str | None
    background: str | None

    def text(self) -> str:
        parts = [
            "image of" if self.image else None,
            " and ".join(item.text() for item in self.objects),
            "collide" if self.collide else None,
            f"while the camera pans {self.camera}" if self.camera else None,
            f"with the {self.front} in front" if self.front else None,
            f"on a {self.background} background" if self.background else None,
        ]
        return " ".join(part for part in parts if part)


# --- reading -------------------------------------------------------------------------------------


def _read_object(text: str) -> _Object | None:
    match = _OBJECT.fullmatch(text)
    if match is None:
        return None
    said = [*match[1].split(), *re.findall(rf"(?:{_MOTION})(?![-\w])", match[3])]
    said = [word.split()[0] for word in said]  # an event by its first word
    kinds: tuple[Collection[str], ...] = (COLOURS, SIZES, DIRECTIONS, SPEEDS, _EVENTS)
    found = [[word for word in said if word in known] for known in kinds]
    if any(len(fitting) > 1 for fitting in found) or len(set(said)) < len(said):
        return None
    colour, size, direction, speed, event = (fitting[0] if fitting else None for fitting in found)
    still = "still" in said or "standing" in said
    moving = bool("moving" in said or direction or speed)
    if still and (moving or event):
        return None
    return _Object(match[2], colour, size, direction, speed, event, moving, still)


def _read(text: str) -> _Caption | None:
    """The prompt, its words resolved, as a caption; None if it cannot be read as one."""
    clauses: dict[str, str | None] = {}
    for name, pattern in (("camera", _CAMERA), ("front", _FRONT), ("background", _BACKGROUND)):
        match = pattern.search(text)
        clauses[name] = match[1] if match else None
        if match:
            text = " ".join((text[: match.start()] + text[match.end() :]).split())
    start = re.match(r"(?:(?:a|the) )?image of ", text)
    text = text[start.end() :] if start else text
    collide = text.endswith(" collide")
    text = text.removesuffix(" collide")
    objects = [_read_object(part) for part in text.split(" and ")]
    read = tuple(item for item in objects if item is not None)
    if len(read) < len(objects) or len(read) > MOST_OBJECTS or (collide and len(read) < 2):
        return None
    happens = collide or clauses["camera"] or not all(item.silent for item in read)
    if start and happens:
        return None
    return _Caption(read, start is not None, collide, **clauses)


# --- drawing -------------------------------------------------------------------------------------


def room(item: _Object, frames: int, canvas: tuple[int, int]) -> float:
    """Short sides that are left beside the object and its way, on the axis where it is tightest.

    canvas: (height, width). What the object leaves open takes no room.
    """
    side = min(canvas)
    across = 2 * SIZES[item.size] if item.size else 0.0
    way = SPEEDS[item.speed] * (frames - 1) if item.speed else 0.0
    right, down = DIRECTIONS[item.direction] if item.direction else (0.0, 0.0)
    return min(canvas[1] / side - abs(right) * way, canvas[0] / side - abs(down) * way) - across


def _complete(
    item: _Object,
    rng: np.random.Generator,
    taken: Collection[str | None],
    small: float,
    frames: int | None,
    canvas: tuple[int, int],
    leave: Collection[str],
) -> _Object:
    """The object with what it leaves open drawn.

    taken: colours of the others. small: probability of that size. frames: None = its way need not
    fit.
    """

    def shares(name: str, mix: Mapping[str, float], asked: bool = True) -> list[tuple[Any, float]]:
        """What this aspect can be."""
        value = getattr(item, name)
        drawn = asked and value is None and name not in leave
        return list(mix.items()) if drawn else [(value, 1.0)]

    sizes = shares("size", {"small": small, "large": 1 - small})
    directions = shares("direction", dict.fromkeys(DIRECTIONS, 1.0), item.moving)
    speeds = shares("speed", dict.fromkeys(SPEEDS, 1.0), item.moving)
    if len(directions) > 1:
        directions = [d for d in directions if (item.shape, item.colour, d[0]) not in HELD_OUT]
    ways = [
        (replace(item, size=size, direction=direction, speed=speed), a * b * c)
        for (size, a), (direction, b), (speed, c) in product(sizes, directions, speeds)
    ]
    spare = [0.0 if frames is None else min(0.0, room(way, frames, canvas)) for way, _ in ways]
    item = _draw(rng, [pair for pair, free in zip(ways, spare, strict=True) if free == max(spare)])
    colours = shares("colour", {name: 1.0 for name in COLOURS if name not in taken})
    if len(colours) > 1:
        colours = [c for c in colours if (item.shape, c[0], item.direction) not in HELD_OUT]
    return replace(item, colour=_draw(rng, colours))


def _draw(rng: np.random.Generator, weights: Sequence[tuple[T, float]]) -> T:
    """One of the values, by its weight."""
    ends = np.cumsum([weight for _, weight in weights])
    return weights[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))][0]


def expand(
    prompt: str,
    seed: int = 0,
    *,
    frames: int = 9,
    size: tuple[int, int] = (32, 32),
    leave: Collection[str] = (),
) -> str:
    """The detailed form of ``prompt``, a pure function of its arguments.

    Args:
        prompt: words of the world.
        seed: of what is drawn.
        frames, size: of the clip, (height, width) in pixels: a way that is drawn fits into it.
        leave: some of ASPECTS that are not drawn, because the clip's known frames show them.

    ``parse`` of the result agrees with ``parse`` of the prompt, all its words are in VOCABULARY,
    and expanding it once more changes nothing.

    Raises:
        UnknownWords: the prompt holds words that the world has no meaning for.
        ValueError: an empty prompt, no frame, no pixel, or an unknown aspect.
    """
    unknown = sorted(set(leave) - set(ASPECTS))
    if unknown:
        raise ValueError(f"leave: expected some of {', '.join(ASPECTS)}, got {', '.join(unknown)}")
    if frames < 1 or min(size) < 1:
        raise ValueError(f"frames, size: expected at least 1, got {frames}, {tuple(size)}")
    Vocabulary(VOCABULARY).encode(prompt, len(prompt))
    text = " ".join(words(prompt))
    said = _read(text)
    if said is None:
        return text
    rng = np.random.default_rng(zlib.crc32(f"{seed} {text}".encode()))
    objects = list(said.objects)
    still = said.collide or said.camera or not all(item.silent for item in objects)
    image = said.image or (frames == 1 and not still)
    if not image and "direction" not in leave:
        objects = [item if item.still else replace(item, moving=True) for item in objects]
    taken = {item.colour for item in objects}
    small = _WORLD.small if len(objects) == 1 else 1.0
    for number, item in enumerate(objects):
        free = said.collide or said.camera or item.event
        objects[number] = _complete(item, rng, taken, small, None if free else frames, size, leave)
        taken.add(objects[number].colour)
    background = said.background
    if background is None and "background" not in leave:
        background = ("checkered " if said.camera else "") + _draw(rng, _WORLD.backgrounds)
    return replace(said, objects=tuple(objects), image=image, background=background).text()
