"""Configurations of the reference stack: frozen dataclasses and the named instances of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Weights = tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class WorldConfig:
    """What the procedural world shows and how often. Weights need not sum to one.

    kinds: scene kinds of clips with more than one frame, see ``model.world.KINDS``.
    sizes: ((height, width), weight); both divisible by 8, the spatial stride of the VAE.
    frames: (T, weight); T = 1 + 4k, so that the VAE's time stride of 4 fits. T = 1 is an image.
    backgrounds: (word, weight).
    small: probability that the object of a one-object scene is small.
    central: probability that a one-object scene starts near the centre.
    """

    kinds: Weights = (("one", 1.0),)
    sizes: Weights = (((32, 32), 1.0),)
    frames: Weights = ((9, 1.0),)
    backgrounds: Weights = (("black", 1.0),)
    small: float = 0.25
    central: float = 0.25

    def __post_init__(self) -> None:
        for (height, width), _ in self.sizes:
            if height % 8 or width % 8 or height < 16 or width < 16:
                raise ValueError(f"sizes: expected multiples of 8 from 16 on, got {height}x{width}")
        for frames, _ in self.frames:
            if frames < 1 or frames % 4 != 1:
                raise ValueError(f"frames: expected T = 1 + 4k, got {frames}")
        for name in ("kinds", "sizes", "frames", "backgrounds"):
            weights = [weight for _, weight in getattr(self, name)]
            if not weights or min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"{name}: expected non-negative weights with a positive sum")


@dataclass(frozen=True)
class VAEConfig:
    """Causal video VAE, 4x8x8: see ``model.vae.VideoVAE``.

    patch: pixels folded into channels at the rim (space to depth), in both directions of space.
    widths: channels at 1/4 and at 1/8 of the resolution.
    blocks: residual blocks per stage in the encoder and in the decoder.
    scale: the latent is multiplied by this one number, so that its standard deviation is about 1.
    """

    latent_channels: int = 16
    patch: int = 4
    widths: tuple[int, int] = (64, 96)
    encoder_blocks: tuple[int, int] = (1, 2)
    decoder_blocks: tuple[int, int] = (2, 2)
    scale: float = 1.0


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of :func:`to_dict`; unknown names raise ValueError."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown fields {unknown}, expected {sorted(names)}")
    return kind(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


WORLDS: dict[str, WorldConfig] = {
    # What two CPU cores can learn in an hour: one object, plain background, short clips.
    "tiny": WorldConfig(
        kinds=(
            ("one", 0.80), ("still", 0.05), ("bounce", 0.04), ("exit", 0.03),
            ("two", 0.05), ("camera", 0.03),
        ),
        sizes=(
            ((32, 32), 0.40), ((32, 48), 0.15), ((48, 32), 0.15), ((40, 40), 0.10),
            ((48, 48), 0.06), ((32, 64), 0.07), ((64, 32), 0.07),
        ),
        frames=((9, 0.70), (1, 0.15), (5, 0.05), (13, 0.05), (17, 0.05)),
        backgrounds=(("black", 0.5), ("gray", 0.25), ("white", 0.25)),
    ),
    # Everything the world can show; for hardware that can learn it.
    "rich": WorldConfig(
        kinds=(
            ("one", 0.25), ("still", 0.05), ("bounce", 0.10), ("exit", 0.08), ("two", 0.15),
            ("three", 0.08), ("occlude", 0.10), ("collide", 0.09), ("camera", 0.10),
        ),
        sizes=(
            ((32, 32), 0.15), ((32, 48), 0.12), ((48, 32), 0.12), ((48, 48), 0.15),
            ((32, 64), 0.12), ((64, 32), 0.12), ((64, 64), 0.22),
        ),
        frames=((9, 0.40), (1, 0.15), (5, 0.05), (13, 0.10), (17, 0.30)),
        backgrounds=(("black", 0.3), ("gray", 0.25), ("white", 0.25), ("brown", 0.2)),
        small=0.4,
    ),
}  # fmt: skip

VAES: dict[str, VAEConfig] = {"tiny": VAEConfig()}
