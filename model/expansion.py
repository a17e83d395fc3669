"""Does a detailed prompt help? `python -m model.expansion --json model/results/expansion.json`.

Scenes and seeds of noise are those of a text-to-video row of ``model.suites``. Each clip is made
twice, with the short prompt and with its expansion (``model.expand``), and read by the frozen
judge. All clips are judged by what the short prompt asks for, and once more by what the expansion
asks for, which short prompts meet by chance. The two clips of a scene are a pair: the difference
has an interval, and McNemar's exact test a p-value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import write_json
from model.cli import Parser, device_of, positive, run, seed_number
from model.evaluate import in_packs
from model.expand import expand
from model.grammar import parse
from model.judge import frozen
from model.metrics import joint, rate
from model.modes import text_to_video
from model.oracle import Reading, read
from model.sample import Sampling
from model.stack import CHECKPOINT, Size, Stack, load_stack
from model.suites import SUITES, SUITES_VERSION, Item, Suite, items_of, round_trip, scenes_hash

Flags = Mapping[str, "bool | None"]
ROWS = {
    suite.name: suite
    for suite in SUITES
    if suite.mode == "text_to_video" and suite.kind in ("one", None) and not suite.detailed
}
_Z = 1.959964


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value of ``gained`` against ``lost`` changes of a paired answer."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """The difference of two rates on the same items with its 95% interval, and McNemar's p-value.

    Interval: Agresti & Min (2005), half an observation added to each cell.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"before, after: expected equal counts, got {len(before)}, {len(after)}")
    gained = sum(b > a for a, b in zip(before, after, strict=True))
    lost = sum(a > b for a, b in zip(before, after, strict=True))
    n = len(before) + 2
    middle = (gained - lost) / n
    spread = _Z * math.sqrt(max(0.0, (gained + lost + 1) / n - middle**2) / n)
    return {
        "difference": round((gained - lost) / len(before), 4),
        "low": round(middle - spread, 4),
        "high": round(middle + spread, 4),
        "gained": gained,
        "lost": lost,
        "p": round(mcnemar(gained, lost), 6),
    }


def flags_of(reading: Reading, prompt: str, suite: Suite) -> dict[str, bool | None]:
    """What is right of a clip for a prompt; ``background`` is not part of ``all``."""
    found = joint(reading, parse(prompt), suite.frames, min(suite.size))
    asked = prompt.endswith(" background")
    right = prompt.removesuffix(" background").endswith(str(reading.background))
    return {**found, "background": right if asked else None}


def _table(arms: Mapping[str, Sequence[Flags]]) -> dict[str, Any]:
    """Per metric, each arm's rate and how the expanded prompts differ from the short ones."""
    table: dict[str, Any] = {}
    for name in arms["short"][0]:
        values = {arm: [flags[name] for flags in found] for arm, found in arms.items()}
        estimates = {arm: rate(column) for arm, column in values.items()}
        row: dict[str, Any] = {arm: e.json() for arm, e in estimates.items() if e is not None}
        if not row:
            continue
        short, full = ([bool(v) for v in values[arm]] for arm in ("short", "expanded"))
        table[name] = {**row, "paired": paired(short, full)}
    return table


@torch.no_grad()
def measure(
    stack: Stack, suite: Suite, count: int, seed: int, sampling: Sampling
) -> dict[str, Any]:
    """One row, as plain JSON types. A scene's number is the seed of its expansion."""
    items = items_of(suite, count, seed)
    height, width = suite.size
    size = Size(width, height, suite.frames)
    prompts = {
        "short": [item.prompt for item in items],
        "expanded": [
            expand(item.prompt, number, frames=suite.frames, size=suite.size)
            for number, item in enumerate(items)
        ],
    }
    read_by: dict[str, list[Reading]] = {}
    for arm, texts in prompts.items():
        jobs = [
            text_to_video(text, size, seed * 1_000_003 + number)
            for number, text in enumerate(texts)
        ]
        read_by[arm] = [read(clip) for clip in in_packs(stack, jobs, sampling)]
    ceilings = _ceilings(stack, items)
    wishes = {
        f"{wish}_wishes": _table({
            arm: [flags_of(r, text, suite) for r, text in zip(readings, texts, strict=True)]
            for arm, readings in (read_by | (ceilings if wish == "short" else {})).items()
        })
        for wish, texts in prompts.items()
    }  # fmt: skip
    return {
        "name": suite.name,
        "size": f"{width}x{height}",
        "frames": suite.frames,
        "clips": count,
        "chance": {"short": round(suite.chance, 6), "expanded": round(suite.chance / 4, 6)},
        "prompts": {arm: texts[:4] for arm, texts in prompts.items()},
        "scenes": scenes_hash(items)[:16],
        **wishes,
    }


def _ceilings(stack: Stack, items: Sequence[Item]) -> dict[str, list[Reading]]:
    """True clips and their round trip, and the floor: the true clip of the next prompt."""
    true = [read(item.video) for item in items]
    trips = [read(round_trip(stack.vae, item)) for item in items]
    return {"true": true, "vae": trips, "shuffled": [*true[1:], true[0]]}


def headline(row: Mapping[str, Any]) -> str:
    """Two lines about a row."""
    lines = []
    for wish in ("short", "expanded"):
        found = row[f"{wish}_wishes"]["all"]
        change = found["paired"]
        lines.append(
            f"{row['name']}, what the {wish} prompt asks for: short {found['short']['value']:.3f}, "
            f"expanded {found['expanded']['value']:.3f}, difference {change['difference']:+.3f} "
            f"[{change['low']:+.3f}, {change['high']:+.3f}], p {change['p']:.3g}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m model.expansion", description="Score prompts with and without expansion."
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--json", type=Path, required=True, help="where the scores go")
    parser.add_argument("--only", action="append", help=f"some of {', '.join(ROWS)} (one_object)")
    parser.add_argument("--clips", type=positive, default=256, help="prompts of a row (256)")
    parser.add_argument("--seed", type=seed_number, default=1)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    names = args.only or ["one_object"]
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    frozen.check()
    stack, sampling = load_stack(args.checkpoint, device_of(args.device)), Sampling()
    rows = []
    for name in names:
        rows.append(measure(stack, ROWS[name], args.clips, args.seed, sampling))
        print(headline(rows[-1]), flush=True)
    about = {
        "schema": 1,
        "judge": frozen.stamp(),
        "suites": SUITES_VERSION,
        "checkpoint": args.checkpoint.name,
        "sampling": asdict(sampling),
        "seed": args.seed,
    }
    write_json(args.json, {**about, "rows": rows})


if __name__ == "__main__":
    run("python -m model.expansion", main)
