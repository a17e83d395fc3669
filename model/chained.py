"""The one-minute row: extensions of extensions, and how attributes and speed drift.

A bouncing object is continued from nine true frames, nine frames at a time, each extension seeing
nothing but the nine frames before it, for a minute at eight frames per second. The clip is read in
windows of nine frames.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.grammar import Wanted
from model.metrics import DISTANCE, joint, pace, places
from model.modes import CONTEXT, extend
from model.modes import run as make
from model.oracle import match_up, read
from model.sample import Sampling
from model.scoring import estimate, passes, unit_of
from model.stack import Size, Stack
from model.video import contact_sheet
from model.world import Scene, render, sample_scene

NAME = "extend_one_minute"
LINKS = 53  # with the first nine frames: 486 frames, 60.75 s
SIDE = 32
SHARE = 16  # a minute is long: one clip for 16 of the other rows'


def scenes_of(count: int, seed: int, links: int = LINKS) -> list[Scene]:
    """One bouncing object each, for CONTEXT * (links + 1) frames."""
    number = zlib.crc32(NAME.encode())
    return [
        sample_scene(np.random.default_rng([seed, 11, number, index]), kind="bounce",
                     size=(SIDE, SIDE), frames=CONTEXT * (links + 1))
        for index in range(count)
    ]  # fmt: skip


def prompt_of(scene: Scene) -> str:
    """True of every part of the minute, unlike a direction."""
    item = scene.objects[0]
    return f"a {item.colour} {item.shape} bouncing off the wall"


@torch.no_grad()
def chain(
    stack: Stack,
    scenes: Sequence[Scene],
    videos: Sequence[Tensor],
    links: int,
    seed: int,
    sampling: Sampling,
) -> list[Tensor]:
    """The clips [3, CONTEXT * (links + 1), H, W], all extended side by side."""  # fmt: skip
    clips = [[video[:, :CONTEXT]] for video in videos]
    for link in range(links):
        jobs = [
            extend(prompt_of(scene), Size(SIDE, SIDE, CONTEXT), parts[-1], "forward", CONTEXT,
                   seed + 997 * link + number)
            for number, (scene, parts) in enumerate(zip(scenes, clips, strict=True))
        ]  # fmt: skip
        for parts, made in zip(clips, make(stack, jobs, sampling), strict=True):
            parts.append(made)
    return [torch.cat(parts, 1) for parts in clips]


def windows(clip: Tensor, scene: Scene) -> list[dict[str, bool | float | None]]:
    """What is right in every window after the given one.

    speed_ratio: read speed over the true one. motion: that is within DISTANCE. all: this and every
    attribute.
    """
    item = scene.objects[0]
    step = np.diff(np.array(item.path[:2]), axis=0)[0]
    wanted = Wanted(item.shape, item.colour, None, item.size)
    found: list[dict[str, bool | float | None]] = []
    for begin in range(CONTEXT, clip.shape[1], CONTEXT):
        reading = read(clip[:, begin : begin + CONTEXT])
        flags = joint(reading, [wanted], CONTEXT, SIDE, turns=True)
        _, objects = match_up(reading, [wanted])
        speed = pace(places(objects[0], CONTEXT), None)
        ratio = None if speed is None else speed / float(np.linalg.norm(step))
        even = ratio is not None and DISTANCE[0] <= ratio <= DISTANCE[1]
        row: dict[str, bool | float | None] = {
            name: flags[name] for name in ("shape", "colour", "size", "count", "readable")
        }
        row.update(motion=even, all=bool(flags["all"]) and even, speed_ratio=ratio)
        found.append(row)
    return found


def evaluate(
    stack: Stack,
    clips: int,
    seed: int,
    sampling: Sampling,
    sheet: Path | None = None,
    links: int = LINKS,
) -> dict[str, Any]:
    """The row, as plain JSON types. n counts windows; those of one clip are not independent."""
    count = max(1, clips // SHARE)
    scenes = scenes_of(count, seed, links)
    videos = [render(scene) for scene in scenes]
    started = time.process_time()
    made = chain(stack, scenes, videos, links, seed * 1_000_003, sampling)
    seconds = time.process_time() - started
    if sheet is not None:
        some = slice(None, None, 2 * CONTEXT)
        contact_sheet(sheet, [clip[:, some] for clip in made[:6]], scale=3)
    held = [video[:, CONTEXT - 1 : CONTEXT].expand_as(video) for video in videos]
    trips = [torch.cat(list(_trip(stack, video)), 1) for video in videos]
    providers = {"generated": made, "true": videos, "vae": trips, "repeat": held}
    found = {
        who: [windows(clip, scene) for clip, scene in zip(parts, scenes, strict=True)]
        for who, parts in providers.items()
    }
    return {
        "name": NAME,
        "mode": "extend",
        "size": f"{SIDE}x{SIDE}",
        "frames": CONTEXT * (links + 1),
        "known": list(range(CONTEXT)),
        "clips": count,
        "chance": 0.0,
        "prompts": [prompt_of(scene) for scene in scenes[:4]],
        "cpu_seconds": round(seconds, 1),
        "metrics": _metrics(found),
    }


def _trip(stack: Stack, video: Tensor) -> list[Tensor]:
    """Every window on its own through the VAE, as extensions are made."""
    parts = video.split(CONTEXT, 1)
    return stack.decode(stack.encode(parts))


def _metrics(found: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Over all windows, and ``all`` and ``speed_ratio`` in the first and in the last quarter."""
    windows_per_clip = len(found["true"][0])
    quarter = max(1, windows_per_clip // 4)
    parts = {
        "": slice(None),
        "first_quarter_": slice(quarter),
        "last_quarter_": slice(-quarter, None),
    }
    result = {}
    for prefix, part in parts.items():
        for name in found["true"][0][0] if not prefix else ("all", "speed_ratio"):
            values = {
                who: estimate(name, [window[name] for clip in clips for window in clip[part]])
                for who, clips in found.items()
            }
            floor, ceiling = values["repeat"], values["true"]
            void = floor is not None and passes(unit_of(name), floor, ceiling, None)
            shown = {who: None if e is None else e.json() for who, e in values.items()}
            result[prefix + name] = {
                "unit": unit_of(name),
                "target": None,
                "generated": shown["generated"],
                "ceilings": {"true": shown["true"], "vae": shown["vae"]},
                "floors": {"repeat": shown["repeat"]},
                "void": void,
                "passed_by": ["repeat"] if void else [],
            }
    return result
