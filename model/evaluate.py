"""Scores a checkpoint with the judge: `python -m model.evaluate --checkpoint DIR --json F`.

Every row of ``model.suites`` is generated, read by the frozen oracle and set beside its ceilings
and floors (``model.scoring``). One more row chains extensions to a minute. The scenes of a row are
fixed by (suites version, seed); the file holds their hash.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import chained
from model.checkpoint import read_json, write_json
from model.cli import Parser, device_of, positive, progress_bar, run, seed_number
from model.judge import frozen
from model.modes import Job, paste
from model.modes import run as make
from model.sample import Sampling
from model.scoring import score
from model.stack import CHECKPOINT, Stack, load_stack
from model.suites import (
    SUITES,
    SUITES_VERSION,
    Item,
    Suite,
    floors_of,
    items_of,
    job_of,
    round_trip,
    scenes_hash,
)
from model.video import contact_sheet

BATCH_TOKENS = 4096
NAMES = (*(suite.name for suite in SUITES), chained.NAME)


def in_packs(stack: Stack, jobs: Sequence[Job], sampling: Sampling) -> list[Tensor]:
    """Makes the clips, as many at a time as BATCH_TOKENS allow."""
    volume = math.prod(stack.dit.config.patch)
    clips: list[Tensor] = []
    waiting: list[Job] = []
    tokens = 0
    for job in jobs:
        cost = _latents(job) // volume
        if waiting and tokens + cost > BATCH_TOKENS:
            clips += make(stack, waiting, sampling)
            waiting, tokens = [], 0
        waiting.append(job)
        tokens += cost
    return clips + make(stack, waiting, sampling)


def _latents(job: Job) -> int:
    """Latent positions of a job: of the clip to make, of a loop's copies, and of what is given."""
    t, h, w = job.size.latent
    given = sum(1 + (part.video.shape[1] - 1) // 4 for part in job.given)
    return (t * (3 if job.loop else 1) + given) * h * w


@torch.no_grad()
def evaluate(
    stack: Stack,
    suite: Suite,
    count: int,
    seed: int,
    sampling: Sampling,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """One row, as plain JSON types. sheet: a picture of up to 12 clips, generated above true."""
    items = items_of(suite, count, seed)
    jobs = [job_of(item, seed * 1_000_003 + number) for number, item in enumerate(items)]
    started = time.process_time()
    made = in_packs(stack, jobs, sampling)
    seconds = time.process_time() - started
    generated = {"generated": _whole(items, made)}
    if any(0 <= part.time < job.size.frames for job in jobs for part in job.given):
        pasted = [paste(job, clip) for job, clip in zip(jobs, made, strict=True)]
        generated["pasted"] = _whole(items, pasted)
    trips = [round_trip(stack.vae, item) for item in items]
    tricks = [floors_of(item) for item in items]
    floors = {name: [trick[name] for trick in tricks] for name in tricks[0]}
    if sheet is not None:
        shown = zip(generated["generated"][:6], (item.video for item in items[:6]), strict=True)
        contact_sheet(sheet, [clip for pair in shown for clip in pair], scale=3)
    return {
        "name": suite.name,
        "mode": suite.mode,
        "size": f"{suite.size[1]}x{suite.size[0]}",
        "frames": suite.frames,
        "known": list(suite.known),
        "clips": count,
        "chance": round(suite.chance, 6),
        "prompts": [item.prompt for item in items[:4]],
        "scenes": scenes_hash(items)[:16],
        "cpu_seconds": round(seconds, 1),
        "metrics": score(items, generated, trips, floors),
    }


def _whole(items: Sequence[Item], made: Sequence[Tensor]) -> list[Tensor]:
    return [item.whole(clip) for item, clip in zip(items, made, strict=True)]


def headline(row: dict[str, Any]) -> str:
    """One line about a row."""
    parts = []
    for name in ("all", "edited", "first_frame_and_all", "seam_and_all", "gain_db", "event_right"):
        metric = row["metrics"].get(name)
        if metric is not None and metric.get("generated") is not None:
            void = " (void)" if metric["void"] else ""
            parts.append(f"{name} {metric['generated']['value']:.2f}{void}")
    return f"{row['name']:22}{'  '.join(parts)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.evaluate", description="Score a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--json", type=Path, required=True, help="where the scores go")
    parser.add_argument("--clips", type=positive, default=64, help="clips per row (64)")
    parser.add_argument("--headline", type=positive, help="clips of the headline rows (as --clips)")
    parser.add_argument("--only", action="append", help="names of rows (default: all)")
    parser.add_argument("--keep", action="store_true",
                        help="keep the other rows that the file has")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=Sampling.steps, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--shift", type=float, default=Sampling.shift)
    parser.add_argument("--seed", type=seed_number, default=1)
    parser.add_argument("--sheets", type=Path, help="folder for pictures of generated clips")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.only or ()) - set(NAMES))
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
    chosen = [name for name in NAMES if not args.only or name in args.only]
    stack = load_stack(args.checkpoint, device_of(args.device))
    frozen.check()
    sampling = Sampling(args.steps, args.guidance, args.shift)
    about = {
        "schema": 2,
        "judge": frozen.stamp(),
        "suites": SUITES_VERSION,
        "checkpoint": args.checkpoint.name,
        "sampling": asdict(sampling),
        "seed": args.seed,
    }
    rows = _rows_to_keep(args.json, about, chosen) if args.keep else {}
    suites = {suite.name: suite for suite in SUITES}
    with progress_bar(args.quiet) as bar:
        task = bar.add_task("evaluating", total=len(chosen))
        for name in chosen:
            bar.update(task, description=name)
            sheet = None if args.sheets is None else args.sheets / f"{name}.png"
            if name == chained.NAME:
                rows[name] = chained.evaluate(stack, args.clips, args.seed, sampling, sheet)
            else:
                suite = suites[name]
                count = args.headline or args.clips if suite.headline else args.clips
                count = max(1, count // suite.share)
                rows[name] = evaluate(stack, suite, count, args.seed, sampling, sheet)
            ordered = [rows[name] for name in NAMES if name in rows]
            write_json(args.json, {**about, "rows": ordered})
            bar.advance(task)
    for name in chosen:
        print(headline(rows[name]))


def _rows_to_keep(path: Path, about: dict[str, Any], chosen: list[str]) -> dict[str, Any]:
    """The rows of a file that was made in the same way, other than those to be made now."""
    if not path.exists():
        return {}
    old = read_json(path)
    differs = sorted(name for name, value in about.items() if old.get(name) != value)
    if differs:
        raise ValueError(f"--keep: expected {path} with equal {', '.join(differs)}")
    return {row["name"]: row for row in old["rows"] if row["name"] not in chosen}


if __name__ == "__main__":
    run("python -m model.evaluate", main)
