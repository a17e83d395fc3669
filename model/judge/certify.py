"""The certificate of the oracle: how often it is right, and how often it lets a wrong clip pass.

For every kind of scene and every size: true clips, their round trip through a VAE and, for one
object, noised clips. A wrong clip shows something else than was asked in exactly one attribute;
``false_accept`` counts those that are judged right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import WorldConfig
from model.grammar import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, STILL, Wanted, parse
from model.judge.frozen import stamp
from model.metrics import places, rate
from model.oracle import Reading, judge, match_up, read
from model.vae import VideoVAE
from model.world import KINDS, Scene, captions, render, sample_scene

SIGMAS = (0.1, 0.2, 0.4)  # of white noise on pixels in [-1, 1]
SIZES_SHOWN = ((56, 32), (32, 56), (48, 48), (64, 64))
BATCH = 16
_WORDS: Mapping[str, Sequence[str]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES),
    "direction": (*DIRECTIONS, STILL), "speed": tuple(SPEEDS),
}  # fmt: skip
_WORLD = WorldConfig(
    backgrounds=(("black", 1.0), ("gray", 1.0), ("white", 1.0), ("brown", 1.0)), small=0.5
)


def certify(
    vae: VideoVAE | None,
    count: int,
    others: int,
    noised: int,
    done: Callable[[dict[str, Any]], None] = lambda report: None,
    seed: int = 5,
) -> dict[str, Any]:
    """The report, as plain JSON types; ``done`` gets it after every part.

    count: clips of one object at 32x32. others: clips of every other kind and size. noised: clips
    of one object for each of SIGMAS.
    """  # fmt: skip
    report: dict[str, Any] = {"schema": 1, "judge": stamp(), "seed": seed, "parts": []}
    plan = [
        ("one", (32, 32), count),
        *((kind, (48, 48), others) for kind in KINDS if kind != "one"),
    ]
    plan += [("one", size, others) for size in SIZES_SHOWN]
    for kind, size, clips in plan:
        scenes = scenes_of(kind, size, clips, seed)
        noise = SIGMAS if kind == "one" and size == (32, 32) else ()
        report["parts"].append(part(kind, size, scenes, vae, noise, noised))
        done(report)
    return report


def scenes_of(kind: str, size: tuple[int, int], count: int, seed: int) -> list[Scene]:
    """Scenes of all sizes of objects and all backgrounds, held-out combinations left out."""
    frames = {"image": 1, "exit": 17, "bounce": 13, "collide": 13}.get(kind, 9)
    return [
        sample_scene(
            np.random.default_rng([seed, 13, zlib.crc32(kind.encode()), *size, number]),
            _WORLD, kind=kind, size=size, frames=frames,
        )
        for number in range(count)
    ]  # fmt: skip


@torch.no_grad()
def part(
    kind: str,
    size: tuple[int, int],
    scenes: Sequence[Scene],
    vae: VideoVAE | None,
    sigmas: Sequence[float],
    noised: int,
) -> dict[str, Any]:
    """One kind at one size."""  # fmt: skip
    clips = [render(scene) for scene in scenes]
    readings = [read(clip) for clip in clips]
    sources = {"true": accuracy(readings, scenes) | {"position": errors(readings, scenes)}}
    if vae is not None:
        trips: list[Tensor] = []
        for start in range(0, len(clips), BATCH):
            trips += vae.decode(vae.encode(torch.stack(clips[start : start + BATCH])))
        again = [read(clip) for clip in trips]
        sources["vae"] = accuracy(again, scenes) | {"position": errors(again, scenes)}
    for sigma in sigmas:
        generator = torch.Generator().manual_seed(int(1000 * sigma))
        some = clips[:noised]
        noisy = [read(clip + sigma * torch.randn(clip.shape, generator=generator)) for clip in some]
        sources[f"noise_{sigma}"] = accuracy(noisy, scenes[:noised])
    return {
        "kind": kind,
        "size": f"{size[1]}x{size[0]}",
        "frames": scenes[0].frames,
        "clips": len(scenes),
        "sources": sources,
        "false_accept": false_accepts(readings, scenes),
    }


def accuracy(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Rates with Wilson intervals of every attribute, of all jointly, and of readable frames."""
    found: dict[str, list[bool | None]] = {}
    for reading, scene in zip(readings, scenes, strict=True):
        verdict = judge(reading, scene)
        flags = vars(verdict) | {"all": verdict.right and verdict.count}
        flags["readable"] = bool(reading.objects) and all(
            item.readable >= 0.95 for item in reading.objects
        )
        for name, flag in flags.items():
            found.setdefault(name, []).append(flag)
    estimates = {name: rate(flags) for name, flags in found.items()}
    return {name: value.json() for name, value in estimates.items() if value is not None}


def errors(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, float]:
    """Distance in pixels between read and true centres over all readable frames of all objects,
    and in pixels per frame between read and true velocities where the object keeps its course."""
    position: list[float] = []
    velocity: list[float] = []
    for reading, scene in zip(readings, scenes, strict=True):
        _, objects = match_up(reading, parse(captions(scene)[1]))
        for item, truth in zip(objects, scene.objects, strict=True):
            if item is None:
                continue
            path = np.array(truth.path)
            away = np.linalg.norm(places(item, scene.frames) - path, axis=-1)
            position += away[~np.isnan(away)].tolist()
            steps = np.diff(path, axis=0)
            even = len(steps) > 0 and float(np.abs(steps - steps[0]).max()) < 1e-6
            for speed in item.velocities if even else ():
                if speed is not None:
                    velocity.append(float(np.linalg.norm(np.array(speed) - steps[0])))
    named = {"position": position, "velocity": velocity}
    return {
        f"{name}_{label}": round(float(np.quantile(values, share)), 3)
        for name, values in named.items() if values
        for label, share in (("median", 0.5), ("p99", 0.99))
    }  # fmt: skip


def false_accepts(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, Any]:
    """By attribute: how often a clip passes that differs in it from what was asked.

    The first object is asked for with another word; "extra" and "missing" ask for one object
    less (of two or more) and one more.
    """
    found: dict[str, list[bool]] = {}
    for number, (reading, scene) in enumerate(zip(readings, scenes, strict=True)):
        wanted = list(parse(captions(scene)[1]))
        for name, asked in wrong(wanted, np.random.default_rng([3, number])).items():
            verdict = judge(reading, asked)
            found.setdefault(name, []).append(verdict.right and verdict.count)
    estimates = {name: rate(flags) for name, flags in found.items()}
    return {name: value.json() for name, value in estimates.items() if value is not None}


def wrong(wanted: list[Wanted], rng: np.random.Generator) -> dict[str, list[Wanted]]:
    """The same objects with one attribute of the first one changed, and one object more or less."""
    first, *rest = wanted
    result: dict[str, list[Wanted]] = {}
    for name, words in _WORDS.items():
        said = getattr(first, name)
        if said is None:
            continue
        others = [word for word in words if word != said]
        if name == "colour":  # a colour of another object would ask for two of it
            others = [word for word in others if word not in [item.colour for item in rest]]
        change = {name: str(rng.choice(others))}
        if change.get("direction") == STILL:
            change["speed"] = None  # type: ignore[assignment]
        result[name] = [replace(first, **change), *rest]
    free = [colour for colour in COLOURS if colour not in [item.colour for item in wanted]]
    result["missing"] = [*wanted, replace(first, colour=str(rng.choice(free)))]
    if rest:
        result["extra"] = rest
    return result
