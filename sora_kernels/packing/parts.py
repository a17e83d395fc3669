"""What a segment is made of: text parts and grid parts."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Order: TypeAlias = Literal["raster", "tile"]
Triple: TypeAlias = tuple[int, int, int]


def as_int(name: str, value: Any, minimum: int) -> int:
    """`value` as a host int of at least `minimum`, or a ValueError that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}") from None
    if isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return number


def as_int_triple(name: str, value: Any, minimum: int) -> Triple:
    """`value` as three host ints, or a ValueError that names it."""
    try:
        items = tuple(value)
    except TypeError:
        raise ValueError(f"{name}: expected three integers (t, h, w), got {value!r}") from None
    if len(items) != 3:
        raise ValueError(f"{name}: expected three integers (t, h, w), got {value!r}")
    t, h, w = (as_int(f"{name}[{i}]", item, minimum) for i, item in enumerate(items))
    return t, h, w


def as_float_triple(name: str, value: Any) -> tuple[float, float, float]:
    """`value` as three finite floats, or a ValueError that names it."""
    try:
        items = tuple(float(item) for item in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected three numbers (t, h, w), got {value!r}") from None
    if len(items) != 3 or not all(map(math.isfinite, items)):
        raise ValueError(f"{name}: expected three finite numbers (t, h, w), got {value!r}")
    return items[0], items[1], items[2]


@dataclass(frozen=True)
class Text:
    """`length` text tokens. They have position 0 on every axis, so RoPE leaves them as they are."""

    length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", as_int("Text.length", self.length, 0))

    @property
    def num_tokens(self) -> int:
        return self.length


@dataclass(frozen=True)
class Grid:
    """A video (or, with t = 1, an image) of `t * h * w` tokens: latent size divided by the patch.

    Token (i, j, k) has the position `origin + (i, j, k) * scale`: a frame rate is a scale on the
    time axis, a context that precedes or follows is an origin, a crop is both.

    Args:
        t, h, w: size in tokens, each at least 1.
        origin: position of token (0, 0, 0), any finite numbers.
        scale: distance between neighbours on each axis, any finite numbers.
        given: clean context (flow time 0) rather than something to be made.
        tile: (t, h, w) tile of this part in tile order; None = `tile_shape` of the grid.
    """

    t: int
    h: int
    w: int
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    given: bool = False
    tile: Triple | None = None

    def __post_init__(self) -> None:
        for axis in "thw":
            object.__setattr__(self, axis, as_int(f"Grid.{axis}", getattr(self, axis), 1))
        object.__setattr__(self, "origin", as_float_triple("Grid.origin", self.origin))
        object.__setattr__(self, "scale", as_float_triple("Grid.scale", self.scale))
        if self.tile is not None:
            object.__setattr__(self, "tile", as_int_triple("Grid.tile", self.tile, 1))

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w


Part: TypeAlias = Text | Grid
