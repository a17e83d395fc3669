"""Did a change make it slower? `python -m sora_kernels.bench.gate --base DIR --head DIR --run CMD`

Both checkouts run the same script in turn (A B B A A B ...), each time in a process of its own, so
that they share the machine's good and bad minutes. The script prints one JSON object,
`{"name": milliseconds, ...}`, as its last line and may time anything; what is compared is the ratio
head over base within each pair of neighbours. The gate fails when, for some name, even the lower
end of the ratio's interval is over the threshold. See docs/ci.md for its use by another project.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .schema import write_text
from .timing import Interval, median_interval

FEWEST_ROUNDS = 6
"""Of pairs: with fewer no interval of a median covers 95%."""

Times = Mapping[str, float]


class Failed(Exception):
    """A run of the script that says nothing about speed."""


def run_once(folder: Path, command: Sequence[str], seconds: float) -> Times:
    """The times that the script prints (last line of its output) in `folder`.

    The folder comes first on PYTHONPATH: an installed package must not stand in for a checkout.
    """
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{folder}: no result after {seconds:.0f} s") from None
    except OSError as error:
        raise Failed(f"{folder}: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{folder}: exit code {done.returncode}: {last}")
    try:
        times = json.loads(done.stdout.strip().splitlines()[-1])
        if not times or not all(float(ms) > 0 for ms in times.values()):
            raise ValueError("no times above 0")
    except (ValueError, IndexError, AttributeError, TypeError):
        expected = 'expected {"name": milliseconds, ...} as the last line of the output'
        raise Failed(f"{folder}: {expected}") from None
    return {name: float(ms) for name, ms in times.items()}


def interleave(
    base: Path, head: Path, command: Sequence[str], rounds: int, seconds: float
) -> list[tuple[Times, Times]]:
    """`rounds` pairs of runs, neighbours in time; who goes first alternates."""
    pairs = []
    for turn in range(rounds):
        order = (base, head) if turn % 2 == 0 else (head, base)
        started = time.monotonic()
        found = {folder: run_once(folder, command, seconds) for folder in order}
        pairs.append((found[base], found[head]))
        print(f"round {turn + 1} of {rounds}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return pairs


def ratios(pairs: Sequence[tuple[Times, Times]]) -> dict[str, Interval]:
    """head / base by name, over the pairs; names that both sides have in every round."""
    names = [n for n in pairs[0][0] if all(n in side for pair in pairs for side in pair)]
    if not names:
        raise Failed("base and head have no measured name in common")
    return {n: median_interval([head[n] / base[n] for base, head in pairs]) for n in names}


def slower(found: Mapping[str, Interval], percent: float) -> list[str]:
    """Names whose whole interval lies over the threshold."""
    return [name for name, ratio in found.items() if ratio.low > 1 + percent / 100]


def table(found: Mapping[str, Interval], failed: Sequence[str]) -> str:
    lines = [f"{'case':52} {'head / base':>11}  interval"]
    for name, ratio in sorted(found.items(), key=lambda item: -item[1].low):
        mark = "  SLOWER" if name in failed else ""
        lines.append(f"{name:52} {ratio.median:11.3f}  [{ratio.low:.3f}, {ratio.high:.3f}]{mark}")
    return "\n".join(lines)


def gate(
    base: Path,
    head: Path,
    command: Sequence[str],
    *,
    rounds: int = 10,
    seconds: float = 300.0,
) -> tuple[dict[str, Interval], list[tuple[Times, Times]]]:
    """head / base by name, and the times of every pair.

    Args:
        base, head: two checkouts. Each is the working folder of its runs and comes first on their
            PYTHONPATH.
        command: the script, as a list of words.
        rounds: pairs of runs.
        seconds: what one run may take.

    Raises:
        ValueError: a folder is missing, both are the same, or there are too few rounds.
        Failed: a run that says nothing about speed.
    """
    for name, folder in (("base", base), ("head", head)):
        if not folder.is_dir():
            raise ValueError(f"{name}: expected a folder, got {folder}")
    base, head = base.resolve(), head.resolve()
    if base == head:
        raise ValueError(f"head: expected another folder than base, got {head} twice")
    if not command:
        raise ValueError("command: expected a program, got nothing")
    if rounds < FEWEST_ROUNDS:
        raise ValueError(
            f"rounds: expected at least {FEWEST_ROUNDS}, the fewest for a 95% interval, "
            f"got {rounds}"
        )
    pairs = interleave(base, head, command, rounds, seconds)
    return ratios(pairs), pairs


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """0 fine, 1 slower, 2 bad input or a run that failed. ``command`` is the default script."""
    parser = argparse.ArgumentParser(
        prog="gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="checkout before")
    parser.add_argument("--head", type=Path, required=True, metavar="DIR", help="checkout after")
    parser.add_argument(
        "--run", default=command, required=command is None, metavar="COMMAND",
        help="the script, run in both checkouts" + (" (default: %(default)s)" if command else ""),
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="pairs (default 10)")
    parser.add_argument("--fail-over", type=float, default=5.0, metavar="PERCENT")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="of one run")
    parser.add_argument("--json", type=Path, metavar="F", help="write all times to this file")
    options = parser.parse_args(argv)
    try:
        if not options.fail_over >= 0:
            raise ValueError(f"--fail-over: expected 0 or more, got {options.fail_over:g}")
        found, pairs = gate(
            options.base, options.head, shlex.split(options.run), rounds=options.rounds,
            seconds=options.limit,
        )  # fmt: skip
        failed = slower(found, options.fail_over)
        print(table(found, failed))
        if options.json:
            report: dict[str, Any] = {
                "fail_over_percent": options.fail_over,
                "ratios": {name: ratio.as_dict() for name, ratio in found.items()},
                "pairs": [{"base": before, "head": after} for before, after in pairs],
            }
            write_text(options.json, json.dumps(report, indent=1) + "\n")
    except (OSError, ValueError, Failed) as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"{len(failed)} of {len(found)} slower by over {options.fail_over:g}%, beyond doubt")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
