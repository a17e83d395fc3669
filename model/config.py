"""Configurations of the reference stack: frozen dataclasses and the named instances of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sora_kernels.packing import Window

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
    # The same things, but mostly the first of them: what is learnt there carries over to the rest.
    "focused": WorldConfig(
        kinds=(
            ("one", 0.88), ("still", 0.04), ("bounce", 0.02), ("exit", 0.02),
            ("two", 0.02), ("camera", 0.02),
        ),
        sizes=(
            ((32, 32), 0.55), ((32, 48), 0.12), ((48, 32), 0.12), ((40, 40), 0.06),
            ((48, 48), 0.05), ((32, 64), 0.05), ((64, 32), 0.05),
        ),
        frames=((9, 0.78), (1, 0.10), (5, 0.04), (13, 0.04), (17, 0.04)),
        backgrounds=(("black", 0.5), ("gray", 0.25), ("white", 0.25)),
    ),
    # What the former two leave for last: more bounces, two objects, larger canvases, longer clips.
    "broad": WorldConfig(
        kinds=(
            ("one", 0.75), ("still", 0.03), ("bounce", 0.10), ("exit", 0.02),
            ("two", 0.08), ("camera", 0.02),
        ),
        sizes=(
            ((32, 32), 0.46), ((32, 48), 0.14), ((48, 32), 0.11), ((40, 40), 0.05),
            ((48, 48), 0.10), ((32, 64), 0.07), ((64, 32), 0.07),
        ),
        frames=((9, 0.70), (1, 0.06), (5, 0.03), (13, 0.14), (17, 0.07)),
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
    # For the VAE: patches and short motions matter, not stories; small canvases are cheap.
    "vae": WorldConfig(
        kinds=(
            ("one", 0.62), ("still", 0.03), ("bounce", 0.06), ("exit", 0.05), ("two", 0.12),
            ("occlude", 0.06), ("camera", 0.06),
        ),
        sizes=(((32, 32), 0.80), ((32, 48), 0.06), ((48, 32), 0.06), ((40, 40), 0.08)),
        frames=((9, 0.84), (5, 0.06), (1, 0.06), (13, 0.04)),
        backgrounds=(("black", 0.45), ("gray", 0.25), ("white", 0.25), ("brown", 0.05)),
    ),
}  # fmt: skip

VAES: dict[str, VAEConfig] = {"tiny": VAEConfig()}


TEXTS = ("words", "minilm")


@dataclass(frozen=True)
class DiTConfig:
    """Diffusion Transformer on latents: see ``model.dit.DiT``.

    patch: latent (t, h, w) folded into one token.
    rope_axes: channels of a head that carry (time, height, width); even, their sum is head_dim.
    rope_theta: base of the rotary frequencies; small grids want a small one.
    text: how words become tokens, one of TEXTS: "words" has a learned vector for each word of a
        closed vocabulary, "minilm" projects the states of a frozen encoder (``model.minilm``).
    vocabulary: word numbers, "no prompt" included.
    base_tokens: grid tokens of the clip at which the time shift is 1 (see ``model.flow``).
    window: (t, h, w) tiles that a patch sees, odd or None for a whole axis; None = its whole clip.
        Words and given frames see and are seen by everything.
    tile: patches in a tile; None = chosen for each grid (``sora_kernels.packing.tile_shape``).
    """

    width: int
    depth: int
    heads: int
    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 16
    mlp_ratio: float = 4.0
    rope_axes: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 10000.0
    vocabulary: int = 1
    max_words: int = 48
    base_tokens: int = 256
    window: tuple[int | None, int | None, int | None] | None = None
    tile: tuple[int, int, int] | None = None
    text: str = "words"

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"text: expected one of {', '.join(TEXTS)}, got {self.text!r}")
        for name in ("width", "depth", "heads", "channels", "vocabulary", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of {self.heads} heads, got {self.width}")
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(
                f"rope_axes: expected even numbers that add up to {self.head_dim}, "
                f"got {self.rope_axes}"
            )
        if self.window is not None:
            Window(self.window)  # raises for what is no window
        elif self.tile is not None:
            raise ValueError(f"tile: expected None without a window, got {self.tile}")

    @property
    def layout(self) -> dict[str, Any]:
        """What a ``PackedLayout`` of this model's clips takes."""
        if self.window is None:
            return {"patch": self.patch}
        return {"patch": self.patch, "order": "tile", "tile": self.tile}

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# S to XL: depths, widths and heads of the DiT paper (Peebles & Xie 2022, table 1).
DITS: dict[str, DiTConfig] = {
    "tiny": DiTConfig(
        128, 6, 4, patch=(1, 1, 1), rope_axes=(8, 12, 12), rope_theta=100.0, base_tokens=48
    ),
    "S": DiTConfig(384, 12, 6),
    "B": DiTConfig(768, 12, 12),
    "L": DiTConfig(1024, 24, 16),
    "XL": DiTConfig(1152, 28, 16, rope_axes=(24, 24, 24)),
}
# Tiles of 2x2 patches, and each patch sees 3x3 of them in its own and in the neighbouring frames.
DITS["tiny-window"] = dataclasses.replace(DITS["tiny"], window=(3, 3, 3), tile=(1, 2, 2))
# Reads any English prompt; every caption of the world has room, in word pieces.
DITS["tiny-minilm"] = dataclasses.replace(DITS["tiny"], text="minilm", max_words=64)


# What is given with a training clip of more than one frame, see ``model.draw``: nothing, its first
# frame, what comes before it, after it or both, several of its frames, or any one of them; or the
# clip is a loop.
MODES: dict[str, Weights] = {
    "text": (("none", 0.8), ("image", 0.2)),
    "all": (
        ("none", 0.45), ("image", 0.15), ("forward", 0.12), ("backward", 0.06),
        ("connect", 0.06), ("fill", 0.10), ("frame", 0.06),
    ),
}  # fmt: skip
MODES["all-and-loops"] = (*((name, 0.75 * share) for name, share in MODES["all"]), ("loop", 0.25))
# Half is continued or goes in a circle: what must be exact where it meets others is learnt last.
MODES["seams"] = (
    ("none", 0.42), ("image", 0.10), ("forward", 0.15), ("backward", 0.11),
    ("connect", 0.05), ("fill", 0.05), ("frame", 0.02), ("loop", 0.10),
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How a DiT is trained: see ``model.train``.

    dit, world: names in DITS and WORLDS.
    clips: how many clips are rendered and encoded once into the latent cache.
    tokens: grid and text tokens of one pack, the batch of one step.
    modes: name in MODES, what is given with a clip and how often.
    drop: probability that a given part is left out, unless it is the only one.
    no_prompt: probability that a clip is shown without its prompt (for guidance).
    detailed: probability that a prompt is the detailed caption, not the short one.
    learning_rate: peak of AdamW's.
    shift: of the times towards noise, at the model's base size (see ``model.flow``).
    muon: peak of Muon's, for the matrices inside the blocks; 0 = AdamW for these too.
    """

    dit: str
    world: str
    clips: int
    tokens: int
    steps: int
    learning_rate: float = 2e-3
    muon: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    shift: float = 1.0
    ema: float = 0.998
    no_prompt: float = 0.1
    detailed: float = 0.5
    modes: str = "text"
    drop: float = 0.1
    seed: int = 0


TRAININGS: dict[str, TrainConfig] = {
    "tiny": TrainConfig("tiny", "tiny", clips=16384, tokens=1536, steps=3200, muon=0.02),
    # Continues the former with `--init`: more time on noisy clips, where prompts decide.
    "tiny-more": TrainConfig(
        "tiny",
        "focused",
        clips=12288,
        tokens=1536,
        steps=2700,
        learning_rate=1.5e-3,
        muon=0.015,
        shift=2.0,
        seed=1,
    ),
    # And once more, on new clips, from a lower peak down to zero.
    "tiny-last": TrainConfig(
        "tiny",
        "focused",
        clips=12288,
        tokens=1536,
        steps=1900,
        learning_rate=1.2e-3,
        muon=0.012,
        shift=2.0,
        detailed=0.3,
        seed=2,
    ),
}
# Continues a model of text to video with every mode.
TRAININGS["tiny-modes"] = dataclasses.replace(
    TRAININGS["tiny-last"], steps=4000, modes="all", seed=4
)
# Continues that one with loops among the modes.
TRAININGS["tiny-loops"] = dataclasses.replace(
    TRAININGS["tiny-modes"],
    clips=6144,
    steps=800,
    learning_rate=8e-4,
    muon=0.008,
    warmup=50,
    modes="all-and-loops",
    seed=5,
)
# And that one with seams, bounces and larger canvases.
TRAININGS["tiny-seams"] = dataclasses.replace(
    TRAININGS["tiny-modes"],
    world="broad",
    clips=20480,
    tokens=2048,
    steps=5500,
    modes="seams",
    seed=6,
)
# The end of that one, on new clips.
TRAININGS["tiny-end"] = dataclasses.replace(
    TRAININGS["tiny-seams"],
    clips=8192,
    steps=1400,
    learning_rate=7e-4,
    muon=0.007,
    warmup=30,
    seed=7,
)
TRAININGS["tiny-window"] = dataclasses.replace(TRAININGS["tiny"], dit="tiny-window")
TRAININGS["tiny-minilm"] = dataclasses.replace(TRAININGS["tiny"], dit="tiny-minilm")
