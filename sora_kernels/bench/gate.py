"""Did a change make it slower? `python -m sora_kernels.bench.gate --base DIR --head DIR --run CMD`

Both checkouts run the same script in turn (A B B A A B ...), each time in a process of its own, so
that they share the machine's good and bad minutes; with `--turns` both at once, measuring in turn,
so that they share its milliseconds. The script prints one JSON object,
`{"name": milliseconds, ...}`, as its last line and may time anything; a list of milliseconds is
taken in turn with the other checkout's. What is compared is the ratio head over base within each
pair of neighbours. The gate fails when, for some name, even the lower
end of the ratio's interval is over the threshold. The intervals hold together: the more names, the
wider each, so that on equal checkouts one in forty runs fails at most, however noisy the machine.
See docs/ci.md for its use by another project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from .schema import write_text
from .timing import Interval, median_interval
from .turns import REFEREE, referee

WRONG = 0.05
"""Probability that any of the intervals misses its ratio; half of it, that one lies above."""

Times = Mapping[str, Sequence[float]]


class Failed(Exception):
    """A run of the script that says nothing about speed."""


def rounds_for(names: int, outliers: int = 0) -> int:
    """Pairs that intervals of so many names need, with so many outliers on either side of each."""
    for rounds in count(1):
        beyond = sum(math.comb(rounds, k) for k in range(outliers + 1))
        if 2 * beyond * names <= WRONG * 2**rounds:
            return rounds
    raise AssertionError


def environment(folder: Path) -> dict[str, str]:
    """The folder and its `src` come first on PYTHONPATH: an installed package must not stand in
    for a checkout."""
    first = [str(folder), *map(str, filter(Path.is_dir, [folder / "src"]))]
    path = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def run_once(folder: Path, command: Sequence[str], seconds: float) -> Times:
    """The times that the script prints (last line of its output) in `folder`."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{folder}: no result after {seconds:.0f} s") from None
    except OSError as error:
        raise Failed(f"{folder}: {error}") from None
    return times_of(folder, done.returncode, done.stdout, done.stderr)


def run_both(folders: Sequence[Path], command: Sequence[str], seconds: float) -> list[Times]:
    """As `run_once` in each of two folders, both at once and taking turns; the first begins."""
    with ExitStack() as stack:
        ends, running, outputs = [], [], []
        for folder in folders:
            mine, theirs = socket.socketpair()
            stack.callback(mine.close)
            mine.settimeout(seconds)
            output = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            number = theirs.fileno()
            try:
                process = subprocess.Popen(
                    command, cwd=folder, env=environment(folder) | {REFEREE: str(number)},
                    stdout=output[0], stderr=output[1], pass_fds=[number],
                )  # fmt: skip
            except OSError as error:
                raise Failed(f"{folder}: {error}") from None
            finally:
                theirs.close()
            stack.callback(process.wait)
            stack.callback(process.kill)  # called first; it may have ended
            ends.append(mine)
            running.append(process)
            outputs.append(output)
        try:
            turns = referee(ends, 0)
            codes = [process.wait(seconds) for process in running]
        except (TimeoutError, subprocess.TimeoutExpired):
            raise Failed(
                f"{' and '.join(map(str, folders))}: nothing for {seconds:.0f} s"
            ) from None
        found = []
        for folder, code, output in zip(folders, codes, outputs, strict=True):
            for stream in output:
                stream.seek(0)
            found.append(times_of(folder, code, *(stream.read() for stream in output)))
    if not all(turns):
        raise Failed("--turns: expected a script that times by sora_kernels.bench.measure")
    return found


def times_of(folder: Path, code: int, output: str, errors: str) -> Times:
    if code:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{folder}: exit code {code}: {last}")
    try:
        printed = json.loads(output.strip().splitlines()[-1])
        times = {
            n: list(map(float, ms if isinstance(ms, list) else [ms])) for n, ms in printed.items()
        }
        if not times or not all(ms and min(ms) > 0 for ms in times.values()):
            raise ValueError("no times above 0")
    except (ValueError, IndexError, AttributeError, TypeError):
        expected = 'expected {"name": milliseconds, ...} as the last line of the output'
        raise Failed(f"{folder}: {expected}") from None
    return times


def shared(pairs: Sequence[tuple[Times, Times]]) -> list[str]:
    """The names that both sides have in every round."""
    names = [n for n in pairs[0][0] if all(n in side for pair in pairs for side in pair)]
    if not names:
        raise Failed("base and head have no measured name in common")
    return names


def interleave(
    base: Path,
    head: Path,
    command: Sequence[str],
    rounds: int | None,
    seconds: float,
    turns: bool,
) -> list[tuple[Times, Times]]:
    """Pairs of runs, neighbours in time; who goes first alternates."""
    pairs: list[tuple[Times, Times]] = []
    while rounds is None or len(pairs) < rounds:
        order = (base, head) if len(pairs) % 2 == 0 else (head, base)
        started = time.monotonic()
        if turns:
            found = dict(zip(order, run_both(order, command, seconds), strict=True))
        else:
            found = {folder: run_once(folder, command, seconds) for folder in order}
        pairs.append((found[base], found[head]))
        names = len(shared(pairs))
        rounds = rounds or rounds_for(names, outliers=1)
        if rounds < rounds_for(names):
            raise ValueError(
                f"rounds: expected at least {rounds_for(names)} for intervals of {names} names, "
                f"got {rounds}"
            )
        took = time.monotonic() - started
        print(f"round {len(pairs)} of {rounds}: {took:.1f} s", file=sys.stderr)
    return pairs


def slowdown(base: Sequence[float], head: Sequence[float]) -> float:
    """head / base of one round: the median over calls that were neighbours."""
    return median(after / before for before, after in zip(base, head, strict=False))


def ratios(pairs: Sequence[tuple[Times, Times]]) -> dict[str, Interval]:
    """head / base by name, over the pairs; with 95% all intervals hold."""
    names = shared(pairs)
    confidence = 1 - WRONG / len(names)
    return {
        n: median_interval([slowdown(base[n], head[n]) for base, head in pairs], confidence)
        for n in names
    }


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
    rounds: int | None = None,
    seconds: float = 300.0,
    turns: bool = False,
) -> tuple[dict[str, Interval], list[tuple[Times, Times]]]:
    """head / base by name, and the times of every pair.

    Args:
        base, head: two checkouts. Each is the working folder of its runs and comes first on their
            PYTHONPATH.
        command: the script, as a list of words.
        rounds: pairs of runs; None: as many as the names need, and one outlier of each.
        seconds: what one run may take.
        turns: both at once, taking turns call by call of `measure`; else one after the other.

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
    if rounds is not None and rounds < rounds_for(1):
        raise ValueError(
            f"rounds: expected at least {rounds_for(1)}, the fewest for a 95% interval, "
            f"got {rounds}"
        )
    pairs = interleave(base, head, command, rounds, seconds, turns)
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
    parser.add_argument(
        "--turns", action=argparse.BooleanOptionalAction, default=command is not None,
        help="run both at once, taking turns; for scripts that time by sora_kernels.bench.measure",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs (default: by the names)")
    parser.add_argument("--fail-over", type=float, default=5.0, metavar="PERCENT")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="of one run")
    parser.add_argument("--json", type=Path, metavar="F", help="write all times to this file")
    options = parser.parse_args(argv)
    try:
        if not options.fail_over >= 0:
            raise ValueError(f"--fail-over: expected 0 or more, got {options.fail_over:g}")
        found, pairs = gate(
            options.base, options.head, shlex.split(options.run), rounds=options.rounds,
            seconds=options.limit, turns=options.turns,
        )  # fmt: skip
        failed = slower(found, options.fail_over)
        print(table(found, failed))
        if alone := sorted({n for pair in pairs for side in pair for n in side} - set(found)):
            print(f"not in every run of both, not compared: {', '.join(alone)}")
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
    doubtful = sum(r.high > 1 + options.fail_over / 100 for r in found.values()) - len(failed)
    if doubtful:
        print(f"{doubtful} of {len(found)} too noisy to tell: {options.fail_over:g}% is inside")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
