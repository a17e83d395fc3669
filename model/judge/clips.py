"""Anybody's clips against their prompts, by the same oracle and the same rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.grammar import COLOURS, DIRECTIONS, SHAPES, Wanted, parse, words
from model.judge.frozen import stamp
from model.metrics import READABLE, joint, rate
from model.oracle import read
from model.video import from_uint8, read_image, read_video

SUFFIXES = (".mp4", ".npy", ".png")


def read_prompts(path: Path) -> dict[str, str]:
    """NAME<tab>prompt, one a line; NAME is a file's name with or without its suffix."""
    if not path.is_file():
        raise ValueError(f"--prompts: expected a file, {path} does not exist")
    prompts: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        name, tab, prompt = line.partition("\t")
        if not tab or not prompt.strip() or not parse(prompt):
            raise ValueError(
                f"--prompts: expected NAME, a tab and a prompt that names an object in line "
                f"{number}, got {line!r}"
            )
        if name in prompts:
            raise ValueError(f"--prompts: expected every name once, got {name!r} again")
        prompts[name] = prompt.strip()
    if not prompts:
        raise ValueError(f"--prompts: expected at least one line, {path} is empty")
    return prompts


def read_clip(path: Path) -> Tensor:
    """float32 [3, T, H, W] in [-1, 1], from a video, a picture, or an array: uint8 [T, H, W, 3],
    or float [3, T, H, W] in [-1, 1]."""
    if path.suffix == ".mp4":
        return read_video(path)[0]
    if path.suffix == ".png":
        return read_image(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--clips: {path} is no readable array: {error}") from error
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3:
        return from_uint8(array)
    if array.dtype.kind == "f" and array.ndim == 4 and array.shape[0] == 3:
        if np.isfinite(array).all() and np.abs(array).max(initial=0) <= 1:
            return torch.from_numpy(array.astype(np.float32))
    raise ValueError(
        f"--clips: expected uint8 [T, H, W, 3] or float [3, T, H, W] in [-1, 1] in {path}, "
        f"got {array.dtype} {list(array.shape)}"
    )


def score_folder(folder: Path, prompts: Path) -> dict[str, Any]:
    """The report: every clip's flags, rates with Wilson intervals, and the shuffled floor.

    A prompt without a clip counts as wrong; a clip without a prompt is an error.
    """
    if not folder.is_dir():
        raise ValueError(f"--clips: expected a folder, got {folder}")
    asked = read_prompts(prompts)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    names = {name: name if name in asked else Path(name).stem for name in files}
    extra = sorted(name for name, key in names.items() if key not in asked)
    if extra:
        raise ValueError(f"--prompts: expected a line for every clip, got none for {extra[0]}")
    by_key = {key: files[name] for name, key in names.items()}
    if len(by_key) < len(files):
        raise ValueError("--clips: expected one file per prompt, got two of the same name")
    keys = list(asked)
    rows: list[dict[str, Any]] = []
    shuffled: list[bool | None] = []
    for number, key in enumerate(keys):
        if key not in by_key:
            rows.append({"name": key, "prompt": asked[key], "missing": True, "all": False})
            shuffled.append(False)
            continue
        clip = read_clip(by_key[key])
        frames, side = clip.shape[1], min(clip.shape[2:])
        reading = read(clip)
        flags = joint(reading, parse(asked[key]), frames, side, *allowances(asked[key]))
        rows.append({"name": key, "prompt": asked[key], "missing": False, **flags})
        other = asked[keys[(number + 1) % len(keys)]]
        flags = joint(reading, parse(other), frames, side, *allowances(other))
        shuffled.append(flags["all"])
    metrics = {
        name: value.json()
        for name in ("shape", "colour", "size", "direction", "speed", "count", "readable", "motion",
                     "all")
        if (value := rate([row.get(name, False) for row in rows])) is not None
    }  # fmt: skip
    floor = rate(shuffled)
    assert floor is not None
    chance = float(np.mean([chance_of(parse(prompt)) for prompt in asked.values()]))
    return {
        "schema": 1,
        "judge": stamp(),
        "clips": len(rows),
        "missing": sum(row["missing"] for row in rows),
        "chance": round(chance, 6),
        "metrics": metrics,
        "shuffled": floor.json(),
        "void": len(keys) > 1 and floor.high >= metrics["all"]["low"],
        "rows": rows,
    }


def allowances(prompt: str) -> tuple[bool, float]:
    """Whether the prompt's objects turn, and the fraction of frames that must be readable: less
    when an object leaves the frame or is hidden."""
    said = set(words(prompt))
    readable = 0.25 if "leaving" in said else 0.5 if "front" in said else READABLE
    return bool(said & {"bouncing", "collide"}), readable


def chance_of(wanted: tuple[Wanted, ...]) -> float:
    """Rate of clips whose objects have every named attribute drawn evenly, in any order."""
    sizes = {"shape": len(SHAPES), "colour": len(COLOURS), "direction": len(DIRECTIONS)}
    chance = 1.0
    for number, item in enumerate(wanted, 1):
        chance *= number
        for name, count in {**sizes, "size": 2, "speed": 2}.items():
            if getattr(item, name) is not None:
                chance /= count
    return min(1.0, chance)
