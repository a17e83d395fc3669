"""The closed language of the world: its words, its captions and their reader.

Captions are true by construction: they are written from the scene's own truth. The same words
are read back by :func:`parse`, so a prompt and a generated clip can be compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.world import ObjectTruth, Scene

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")

# sRGB in [0, 1]; hues about 60 degrees apart, so that a colour survives a lossy decoder.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.70, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.75, 0.20, 0.85),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.06, 0.06, 0.06),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.94, 0.94, 0.94),
    "brown": (0.33, 0.21, 0.12),
}

_D = 0.5**0.5
# Unit vectors (x to the right, y down: image coordinates).
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down-right": (_D, _D),
    "down": (0.0, 1.0),
    "down-left": (-_D, _D),
    "left": (-1.0, 0.0),
    "up-left": (-_D, -_D),
    "up": (0.0, -1.0),
    "up-right": (_D, -_D),
}
STILL = "still"
SIZES: dict[str, float] = {"small": 0.16, "large": 0.24}  # radius / short side
SPEEDS: dict[str, float] = {"slowly": 0.028, "quickly": 0.055}  # short sides per frame

_FUNCTION_WORDS: tuple[str, ...] = (
    "a", "and", "background", "bouncing", "camera", "checkered", "collide", "frame", "front",
    "image", "in", "leaving", "moving", "of", "off", "on", "pans", "standing", "still", "the",
    "wall", "while", "with",
)  # fmt: skip

VOCABULARY: tuple[str, ...] = tuple(
    sorted({*SHAPES, *COLOURS, *BACKGROUNDS, *DIRECTIONS, *SIZES, *SPEEDS, *_FUNCTION_WORDS})
)
"""Every word a caption can hold, sorted. The tokenizer adds its own special tokens."""

SYNONYMS: dict[str, str] = {
    "an": "a", "ball": "circle", "disc": "circle", "disk": "circle", "dot": "circle",
    "box": "square", "plus": "cross", "magenta": "purple", "violet": "purple", "grey": "gray",
    "big": "large", "little": "small", "tiny": "small", "slow": "slowly", "fast": "quickly",
    "leftwards": "left", "rightwards": "right", "upwards": "up", "downwards": "down",
    "moves": "moving", "going": "moving", "stands": "standing", "bounces": "bouncing",
    "picture": "image", "colliding": "collide", "panning": "pans",
}  # fmt: skip

# (shape, colour, direction) never shown in training, by the VAE's or the DiT's trainer: 16 of
# 192, every shape four times, every direction twice, every colour two to four times.
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("circle", "red", "right"), ("triangle", "blue", "right"),
        ("square", "cyan", "down-right"), ("cross", "yellow", "down-right"),
        ("circle", "green", "down"), ("triangle", "red", "down"),
        ("square", "purple", "down-left"), ("cross", "cyan", "down-left"),
        ("circle", "blue", "left"), ("triangle", "green", "left"),
        ("square", "yellow", "up-left"), ("cross", "purple", "up-left"),
        ("circle", "yellow", "up"), ("triangle", "purple", "up"),
        ("square", "red", "up-right"), ("cross", "blue", "up-right"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """One object of a prompt; None where the prompt is silent."""

    shape: str | None = None
    colour: str | None = None
    direction: str | None = None  # a key of DIRECTIONS, or STILL
    size: str | None = None  # a key of SIZES
    speed: str | None = None  # a key of SPEEDS


def words(text: str) -> list[str]:
    """Lower-case words of ``text`` with synonyms resolved; "up left" becomes "up-left".

    Words outside VOCABULARY are kept as they are: the caller decides what to do with them.
    """
    found = [SYNONYMS.get(word, word) for word in re.findall(r"[a-z0-9'-]+", text.lower())]
    joined: list[str] = []
    for word in found:
        if word in ("left", "right") and joined and joined[-1] in ("up", "down"):
            joined[-1] = f"{joined[-1]}-{word}"
        else:
            joined.append(word)
    return joined


def unknown_words(text: str) -> list[str]:
    """The words of ``text`` that the world has no meaning for, in order, each once."""
    known = set(VOCABULARY)
    return list(dict.fromkeys(word for word in words(text) if word not in known))


def parse(text: str) -> tuple[Wanted, ...]:
    """The objects a prompt asks for, in order. What follows "camera" or "with" is not an object."""
    objects: list[dict[str, str]] = []
    ahead: dict[str, str] = {}  # what is said of an object before its shape
    for word in words(text):
        if word in ("camera", "with"):
            break
        if word in COLOURS:
            ahead["colour"] = word
        elif word in SIZES:
            ahead["size"] = word
        elif word in SHAPES:
            objects.append({"shape": word} | ahead)
            ahead = {}
        elif objects and (word in DIRECTIONS or word == "still"):
            objects[-1].setdefault("direction", word)
        elif objects and word in SPEEDS:
            objects[-1].setdefault("speed", word)
    return tuple(Wanted(**item) for item in objects)


def captions(scene: Scene) -> tuple[str, str]:
    """(short, detailed) captions of ``scene``, both true and both within VOCABULARY."""
    return _caption(scene, detailed=False), _caption(scene, detailed=True)


def _caption(scene: Scene, detailed: bool) -> str:
    parts = [_object(scene, item, detailed) for item in scene.objects]
    text = " and ".join(parts)
    kinds = {event.kind for event in scene.events}
    if "collision" in kinds:
        text += " collide"
    if scene.camera is not None:
        text += f" while the camera pans {scene.camera}"
    if not detailed:
        return text
    if scene.frames == 1:
        text = f"image of {text}"
    front = next((event for event in scene.events if event.kind == "occlusion"), None)
    if front is not None:
        nearer = scene.objects[max(front.objects)]
        text += f" with the {nearer.colour} {nearer.shape} in front"
    pattern = "checkered " if scene.checkered else ""
    return f"{text} on a {pattern}{scene.background} background"


def _object(scene: Scene, item: ObjectTruth, detailed: bool) -> str:
    size = f"{item.size} " if detailed else ""
    text = f"a {size}{item.colour} {item.shape}"
    if scene.frames == 1:
        return text
    if item.direction == STILL:
        return f"{text} standing still"
    text += f" moving {item.direction}"
    if detailed:
        text += f" {item.speed}"
    index = scene.objects.index(item)
    kinds = {event.kind for event in scene.events if index in event.objects}
    if "exit" in kinds:
        text += " leaving the frame"
    elif "bounce" in kinds and "collision" not in kinds:
        text += " bouncing off the wall"
    return text
