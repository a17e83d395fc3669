"""The parts of the GPU lane, each a command with a time limit; `gpu_lane.sh` starts this.

Parts are independent and can be run one by one into the same folder: every part that needs the
compiled libraries builds them first, which costs nothing when they are up to date. The folder
then holds `lane.json` (what ran, how long, how it ended), `lane.log` (all output), `info.json`,
`test.xml`, and the reports `ops.json`, `block.json` and `e2e.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 520  # a part must end well within nine minutes
BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")


@dataclass(frozen=True)
class Part:
    """Commands run one after another; the first failure ends the part."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def parts(out: Path, quick: bool) -> list[Part]:
    """Everything the lane does, in order."""
    python = sys.executable
    suffix = ("--quick",) if quick else ()

    def bench(name: str, suite: str, *more: str) -> Part:
        report = str(out / f"{name}.json")
        command = (python, "-m", "benchmarks", "--suite", suite, "--device", "cuda", *more)
        return Part(name, (BUILD, (*command, *suffix, "--json", report)))

    info = f"{python} -m sora_kernels.info --json > {out / 'info.json'}"
    tests = ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "tests/ops", "--durations=5")
    ops = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    return [
        Part("build", (BUILD, ("sh", "-c", info))),
        Part("test", (BUILD, (python, *tests, f"--junitxml={out / 'test.xml'}"))),
        *(bench(f"ops-{op}", "ops", "--only", op) for op in ops),
        bench("block", "block"),
        bench("e2e", "e2e"),
    ]


def select(every: list[Part], wanted: Iterable[str]) -> list[Part]:
    """The parts named; `ops` stands for all of its parts. ValueError for an unknown name."""
    wanted = list(wanted)
    names = [part.name for part in every]
    for name in wanted:
        if name != "ops" and name not in names:
            raise ValueError(f"--part: expected one of {', '.join([*names, 'ops'])}, got {name}")
    if not wanted:
        return every
    return [p for p in every if p.name in wanted or ("ops" in wanted and p.name[:4] == "ops-")]


def run_part(part: Part, seconds: float, log: TextIO) -> dict[str, Any]:
    """Runs the commands with their output in the log; the record says how it ended."""
    started = time.monotonic()
    status = "ok"
    build = "cuda" if any((ROOT / "csrc" / "cuda").glob("*.cu")) else "cpu"  # fails loudly
    environment = {"SORA_KERNELS_BUILD": build, **os.environ}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    for command in part.commands:
        log.write(f"\n== {part.name}: {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(1.0, seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            _end(process)
            raise
        else:
            status = "ok" if code == 0 else f"exit code {code}"
        _end(process)
        if status != "ok":
            break
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and whatever it started; nothing may hold the GPU for the next part."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def merge_ops(out: Path) -> None:
    """Joins the reports of the single ops, and of an earlier run of the lane, into `ops.json`."""
    merged = read_json(out / "ops.json")
    for path in sorted(out.glob("ops-*.json")):
        report = json.loads(path.read_text())
        fresh = {row["op"] for row in report["rows"]}
        old = [row for row in merged.get("rows", []) if row["op"] not in fresh]
        merged = {**report, "rows": old + report["rows"]}
        path.unlink()
    if merged:
        write_json(out / "ops.json", merged)


def note(out: Path, name: str) -> str:
    """The result of a part in a few words."""
    if name == "test" and (out / "test.xml").is_file():
        suite = ElementTree.parse(out / "test.xml").getroot().find("testsuite")
        if suite is not None:
            counts = ("tests", "failures", "errors", "skipped")
            return ", ".join(f"{suite.get(count)} {count}" for count in counts)
    report = read_json(out / f"{'ops' if name.startswith('ops-') else name}.json")
    rows = [r for r in report.get("rows", []) if name in ("block", "e2e", f"ops-{r['op']}")]
    if not rows:
        return ""
    ours = {_key(r): r["p50_ms"] for r in rows if r["provider"] == "sora_kernels"}
    words = [f"{len(rows)} rows"]
    if name.startswith("ops-"):
        rooflines = [r["roofline"] for r in rows if r["provider"] == "sora_kernels"]
        words += [f"median roofline {median(rooflines):.2f}"] if rooflines else []
    for provider in sorted({r["provider"] for r in rows} - {"sora_kernels"}):
        pairs = [
            r["p50_ms"] / ours[_key(r)]
            for r in rows
            if r["provider"] == provider and ours.get(_key(r))
        ]
        words += [f"{median(pairs):.2f}x {provider}"] if pairs else []
    return ", ".join(words)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["mode"], row["case"], row["dtype"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_lane.sh", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="start no part once this much time has passed (default 30)",
    )
    parser.add_argument("--part", action="append", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few benchmark cases")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--no-gpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not (args.list or args.no_gpu):
        parser.error("--out: expected a folder for the results")
    if not args.budget > 0:
        parser.error(f"--budget: expected minutes above 0, got {args.budget:g}")
    out = (args.out or Path("DIR")).resolve() if args.out else Path("DIR")
    try:
        chosen = select(parts(out, args.quick), args.part)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list or args.no_gpu:
        if args.no_gpu:
            print("no Python here sees an NVIDIA GPU; on a machine with one this would run:")
        for part in chosen:
            print(f"{part.name:24} " + " && ".join(" ".join(c) for c in part.commands))
        return 0
    return run(chosen, out, args.budget * 60)


def run(chosen: list[Part], out: Path, budget: float) -> int:
    """Runs the parts within the budget and prints the table; 1 if a part did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = read_json(out / "lane.json").get("parts", {})
    started = time.monotonic()
    with open(out / "lane.log", "a") as log:
        for part in chosen:
            left = budget - (time.monotonic() - started)
            if left < 5:
                records[part.name] = {"status": "not run: out of budget", "seconds": 0.0}
            else:
                print(f"{part.name} ...", flush=True)
                records[part.name] = run_part(part, min(LIMIT_SECONDS, left), log)
                merge_ops(out)
                records[part.name]["note"] = note(out, part.name)
            write_json(out / "lane.json", {"parts": records})
    print(f"\n{'part':24} {'seconds':>8}  result")
    for part in chosen:
        record = records[part.name]
        result = "; ".join(filter(None, (record["status"], record.get("note", ""))))
        print(f"{part.name:24} {record['seconds']:8.1f}  {result}")
    print(f"results in {out}")
    return int(any(records[part.name]["status"] != "ok" for part in chosen))


if __name__ == "__main__":
    sys.exit(main())
