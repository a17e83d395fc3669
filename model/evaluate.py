"""Scores a checkpoint with the oracle: `python -m model.evaluate --checkpoint DIR --json F`.

Every suite draws scenes of the world, takes their captions as prompts, generates clips, and lets
the oracle read them. The same oracle reads the true clips and their round trip through the VAE:
those are the ceilings. Rates come with 95% Wilson intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import write_json
from model.cli import Parser, positive, progress_bar, run
from model.generate import CHECKPOINT, Size, Stack, generate, load_stack
from model.oracle import judge, read
from model.sample import Sampling
from model.video import contact_sheet
from model.world import Scene, captions, render, sample_scene

ATTRIBUTES = ("shape", "colour", "direction", "all")
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Suite:
    """Scenes of one kind. size: (height, width). given: known first frames, 1 + 4k, or 0.

    chance: rate of a clip that shows any object, drawn evenly from the world's words, for "all".
    """

    name: str
    kind: str | None
    size: tuple[int, int]
    frames: int
    chance: float
    held_out: bool = False
    detailed: bool = False
    given: int = 0


ONE = 1 / (4 * 6 * 8)
SUITES: tuple[Suite, ...] = (
    Suite("one_object", "one", (32, 32), 9, ONE),
    Suite("one_object_detailed", "one", (32, 32), 9, ONE, detailed=True),
    Suite("held_out", None, (32, 32), 9, ONE, held_out=True),
    Suite("size_32x48", "one", (32, 48), 9, ONE),
    Suite("size_48x32", "one", (48, 32), 9, ONE),
    Suite("size_48x48", "one", (48, 48), 9, ONE),
    Suite("size_32x64", "one", (32, 64), 9, ONE),
    Suite("size_40x48_unseen", "one", (40, 48), 9, ONE),
    Suite("frames_17", "one", (32, 32), 17, ONE),
    Suite("image", "image", (32, 32), 1, 1 / 24),
    Suite("still", "still", (32, 32), 9, ONE * 8 / 9),
    Suite("image_to_video", "one", (32, 32), 9, 1 / 8, given=1),
    Suite("continue_5_frames", "one", (32, 32), 13, 1 / 8, given=5),
    Suite("two_objects", "two", (32, 48), 9, 2 * ONE**2),
)


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a rate (Wilson 1927)."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right: expected 0 to {count} of at least 1, got {right}")
    rate = right / count
    middle = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    low, high = (middle - spread) / below, (middle + spread) / below
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def score(clips: Sequence[Tensor], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Rates and intervals per attribute; "all" wants them right jointly, and no object more."""
    right = dict.fromkeys((*ATTRIBUTES, "count"), 0)
    for clip, scene in zip(clips, scenes, strict=True):
        verdict = judge(read(clip), scene)
        for name in ("shape", "colour", "direction", "count"):
            right[name] += int(getattr(verdict, name))
        right["all"] += int(verdict.right and verdict.count)
    result = {}
    for name, number in right.items():
        low, high = wilson(number, len(clips))
        rate = number / len(clips)
        result[name] = {"rate": round(rate, 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def scenes_of(suite: Suite, count: int, seed: int) -> list[Scene]:
    """The scenes of a suite, none of which the training has seen."""
    return [
        sample_scene(
            np.random.default_rng([seed, 11, SUITES.index(suite), index]),
            kind=suite.kind,
            size=suite.size,
            frames=suite.frames,
            held_out=suite.held_out,
        )
        for index in range(count)
    ]


def in_packs(
    stack: Stack,
    prompts: Sequence[str],
    sizes: Sequence[Size],
    seed: int,
    sampling: Sampling,
    starts: Sequence[Tensor | None],
) -> list[Tensor]:
    """Generates the clips, as many at a time as BATCH_TOKENS allow."""
    clips: list[Tensor] = []
    volume = math.prod(stack.dit.config.patch)
    at_once = max(1, BATCH_TOKENS * volume // max(math.prod(size.latent) for size in sizes))
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        clips += generate(
            stack,
            prompts[part],
            sizes[part],
            seed=seed + start,
            sampling=sampling,
            starts=starts[part],
        )
    return clips


@torch.no_grad()
def evaluate(
    stack: Stack,
    suite: Suite,
    count: int,
    seed: int,
    sampling: Sampling,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """One row: the generated clips, the true clips, and the true clips through the VAE."""
    scenes = scenes_of(suite, count, seed)
    prompts = [captions(scene)[int(suite.detailed)] for scene in scenes]
    height, width = suite.size
    sizes = [Size(width, height, suite.frames)] * count
    true = [render(scene) for scene in scenes]
    starts = [clip[:, : suite.given] if suite.given else None for clip in true]
    made = in_packs(stack, prompts, sizes, seed, sampling, starts)
    trip = [
        stack.vae.decode(stack.vae.encode(clip[None].to(stack.device)))[0].cpu() for clip in true
    ]
    if sheet is not None:
        contact_sheet(sheet, made[:16], scale=4)
    return {
        "name": suite.name,
        "size": f"{width}x{height}",
        "frames": suite.frames,
        "clips": count,
        "chance": round(suite.chance, 6),
        "prompts": prompts[:4],
        "generated": score(made, scenes),
        "vae_round_trip": score(trip, scenes),
        "true_clip": score(true, scenes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.evaluate", description="Score a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--json", type=Path, required=True, help="where the scores go")
    parser.add_argument("--clips", type=positive, default=128, help="clips per row")
    parser.add_argument("--only", action="append", help="names of rows (default: all)")
    parser.add_argument("--steps", type=positive, default=Sampling.steps, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--shift", type=float, default=Sampling.shift)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheets", type=Path, help="folder for pictures of generated clips")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    names = [suite.name for suite in SUITES]
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    chosen = [suite for suite in SUITES if not args.only or suite.name in args.only]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stack = load_stack(args.checkpoint, device)
    sampling = Sampling(args.steps, args.guidance, args.shift)
    rows = []
    with progress_bar(args.quiet) as bar:
        task = bar.add_task("evaluating", total=len(chosen))
        for suite in chosen:
            bar.update(task, description=suite.name)
            sheet = None if args.sheets is None else args.sheets / f"{suite.name}.png"
            rows.append(evaluate(stack, suite, args.clips, args.seed, sampling, sheet))
            bar.advance(task)
    write_json(
        args.json,
        {
            "schema": 1,
            "checkpoint": args.checkpoint.name,
            "sampling": {"steps": args.steps, "guidance": args.guidance, "shift": args.shift},
            "seed": args.seed,
            "rows": rows,
        },
    )
    for row in rows:
        best = row["generated"]
        rates = "  ".join(f"{name} {best[name]['rate']:.2f}" for name in ATTRIBUTES)
        print(f"{row['name']:22}{rates}  (VAE {row['vae_round_trip']['all']['rate']:.2f})")


if __name__ == "__main__":
    run("python -m model.evaluate", main)
