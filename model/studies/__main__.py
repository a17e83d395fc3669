"""`python -m model.studies NAME`: trains, measures, writes a JSON file and a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import read_json, write_json
from model.cli import Parser, positive, run
from model.config import to_dict
from model.data import LatentCache, load_cache, save_cache
from model.judge import frozen
from model.stack import CHECKPOINT
from model.studies import compute, events, native, packing, runs
from model.studies.looking import SAMPLING
from model.vae import VideoVAE, load_vae

STUDIES = {"packing": packing, "native": native, "compute": compute, "events": events}
RESULTS = Path(__file__).parents[1] / "results"
PICTURES = Path(__file__).parents[2] / "docs" / "images"


def _cached(folder: Path, make: Callable[[], LatentCache], key: dict[str, Any]) -> LatentCache:
    """The cache in `folder`, made first if it is not there."""
    path = folder / ("-".join(str(value) for value in key.values()) + ".safetensors")
    cache = load_cache(path, key)
    if cache is None:
        cache = make()
        save_cache(path, cache, key)
    return cache


def _arms(args: Any, vae: VideoVAE) -> list[runs.Arm]:
    name, out = args.study, args.out / "caches"
    clips = args.cache or STUDIES[name].CONFIG.clips
    if name == "native":

        @lru_cache(maxsize=2)
        def of_arm(arm: str, seed: int) -> LatentCache:
            key = {"study": name, "arm": arm, "seed": seed, "clips": clips}
            return _cached(out, partial(native.caches, vae, arm, seed, clips), key)

        return native.arms(vae, of_arm, args.minutes, args.clips)
    study: Any = STUDIES[name]

    @lru_cache(maxsize=1)
    def of_seed(seed: int) -> LatentCache:
        key = {"study": name, "seed": seed, "clips": clips}
        return _cached(out, partial(study.caches, vae, seed, clips), key)

    return study.arms(vae, of_seed, args.steps if name == "compute" else args.minutes, args.clips)


def _summary(rows: list[list[runs.Row]]) -> dict[str, Any]:
    """Mean and range over the seeds of what stands in the last row."""
    last = [run[-1] for run in rows]
    found = {name: runs.spread([row[name] for row in last])
             for name in last[0]
             if name not in ("budget", "tokens") and all(row[name] is not None for row in last)
    }  # fmt: skip
    found["clips_per_second"] = runs.spread([row["clips"] / row["seconds"] for row in last])
    return found


def report(args: Any, vae: VideoVAE, arms: list[runs.Arm], seeds: list[int]) -> None:
    """Writes the JSON file and the picture, if every run of the study is there."""
    home = args.out / args.study
    missing = [f"{arm.name}-{seed}" for arm in arms for seed in seeds
               if not (home / f"{arm.name}-{seed}" / runs.RESULT).exists()]  # fmt: skip
    if missing:
        print(f"no report yet, to be run: {', '.join(missing)}")
        return
    study: Any = STUDIES[args.study]
    found = {arm.name: [read_json(home / f"{arm.name}-{seed}" / runs.RESULT) for seed in seeds]
             for arm in arms}  # fmt: skip
    rows = {name: [result["rows"] for result in results] for name, results in found.items()}
    value: dict[str, Any] = {
        "schema": 1,
        "study": args.study,
        "question": (study.__doc__ or "").split("\n\n")[0],
        "judge": frozen.stamp(),
        "torch": torch.__version__,
        "threads": 1,
        "seeds": seeds,
        "clips_read": args.clips,
        "world": to_dict(study.WORLD),
        "train": next(iter(found.values()))[0]["train"],
        "sampling": to_dict(SAMPLING),
        "arms": {arm.name: {"label": arm.label, "summary": _summary(rows[arm.name]),
                            "runs": rows[arm.name]} for arm in arms},
    }  # fmt: skip
    if args.study in ("native", "events"):
        value["ceilings"] = study.ceilings(vae, study.questions(args.clips))
    write_json(args.json / f"study_{args.study}.json", value)
    study.picture(rows, args.pictures / f"study_{args.study}.png")
    if args.study == "compute":
        folders = [home / f"{arm.name}-{seeds[0]}" for arm in arms]
        compute.samples(vae, folders, args.pictures / "study_compute_clips.png")
    for name, arm in value["arms"].items():
        shown = {k: v["mean"] for k, v in arm["summary"].items() if k not in ("flops", "step")}
        print(f"{name:14}" + "  ".join(f"{k} {v:g}" for k, v in shown.items()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.studies", description="Run or resume a study.")
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="runs and caches")
    parser.add_argument("--json", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the picture")
    parser.add_argument("--seeds", type=positive, default=3, help="0 to N - 1 (3)")
    parser.add_argument("--seed", type=int, action="append", help="run only this one of them")
    parser.add_argument("--arm", action="append", help="run only this arm")
    parser.add_argument("--minutes", type=float, default=4.0,
                        help="CPU minutes of each run, without compute's")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=compute.CONFIG.steps,
                        help="of the shortest run (compute)")  # fmt: skip
    parser.add_argument("--clips", type=positive, default=96, help="made and read at every look")
    parser.add_argument("--cache", type=positive, help="clips to train on")
    parser.add_argument("--vae", type=Path, default=CHECKPOINT, help="folder of the VAE checkpoint")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ValueError(f"--minutes: expected a positive number, got {args.minutes}")
    seeds = list(range(args.seeds))
    unknown = sorted({*(args.seed or ())} - {*seeds})
    if unknown:
        raise ValueError(f"--seed: expected some of {seeds}, got {unknown}")
    frozen.check()
    torch.set_num_threads(1)
    vae = load_vae(args.vae)
    arms = _arms(args, vae)
    strange = sorted({*(args.arm or ())} - {arm.name for arm in arms})
    if strange:
        names = ", ".join(arm.name for arm in arms)
        raise ValueError(f"--arm: expected some of {names}, got {', '.join(strange)}")
    for seed in args.seed or seeds:
        for place in range(len(arms)):
            arm = arms[(place + seed) % len(arms)]  # none is always the first or the last
            folder = args.out / args.study / f"{arm.name}-{seed}"
            if (args.arm and arm.name not in args.arm) or (folder / runs.RESULT).exists():
                continue
            runs.run(arm, seed, folder, lambda text: print(text, file=sys.stderr, flush=True))
    report(args, vae, arms, seeds)


if __name__ == "__main__":
    run("python -m model.studies", main)
