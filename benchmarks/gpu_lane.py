"""Runs the parts of the GPU lane, each with a time limit; `gpu_lane.sh` starts this.

Parts are independent and can be run one by one into the same folder: every part that needs the
compiled libraries builds them first, which costs nothing when they are up to date. A part that
ended well is not run again into the same folder, unless it is named or `--again` is given. Where
there is no GPU, the parts that need one are skipped and counted. The folder then holds `lane.json`
(what ran, how long, how it ended), `lane.log` (all output), `info.json`, `ceilings.json`,
`test-*.xml`, the reports `ops.json`, `block.json`, `e2e.json` and `dropin.json`, and `tables/`.
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
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from .gpu_lane_parts import Part, parts, refuse_wheels, select

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 520  # a part must end well within nine minutes
SKIPPED = "skipped"  # how the status of a part begins that this machine cannot run


def run_part(part: Part, seconds: float, log: TextIO, site: Path | None) -> dict[str, Any]:
    """Runs the commands with their output in the log; the record says how it ended. ``site`` is a
    folder of further packages."""
    started = time.monotonic()
    status = "ok"
    build = "cuda" if any((ROOT / "csrc" / "cuda").glob("*.cu")) else "cpu"  # fails loudly
    environment = {"SORA_KERNELS_BUILD": build, **os.environ}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    if site is not None and site.is_dir():
        paths = (str(site), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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
    if (out / f"{name}.xml").is_file():
        suite = ElementTree.parse(out / f"{name}.xml").getroot().find("testsuite")
        if suite is not None:
            counts = ("tests", "failures", "errors", "skipped")
            return ", ".join(f"{suite.get(count)} {count}" for count in counts)
    report = read_json(out / f"{'ops' if name.startswith('ops-') else name}.json")
    whole = ("block", "e2e", "dropin")
    rows = [r for r in report.get("rows", []) if name in (*whole, f"ops-{r['op']}")]
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
    parser.add_argument("--again", action="store_true", help="also what ended well before")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="peers, installed into --out")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--no-gpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not args.list:
        parser.error("--out: expected a folder for the results")
    if not args.budget > 0:
        parser.error(f"--budget: expected minutes above 0, got {args.budget:g}")
    if args.wheels and (reason := refuse_wheels(args.wheels)):
        parser.error(reason)
    out = args.out.resolve() if args.out else Path("DIR")
    try:
        chosen = select(parts(out, args.quick, args.wheels), args.part)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        print(listing(chosen))
        return 0
    again = args.again or bool(args.part)
    return run(chosen, out, args.budget * 60, gpu=not args.no_gpu, again=again)


def listing(chosen: list[Part]) -> str:
    """One line per part: what it is called, how long it should take, what it runs."""
    lines = [f"{'part':30} {'minutes':>7}  commands"]
    for part in chosen:
        text = " && ".join(" ".join(command) for command in part.commands)
        text = text.replace(sys.executable, "python")
        text = " ".join(text.split())
        lines.append(f"{part.name:30} {part.minutes:7.1f}  {text[:160]}")
    total = sum(part.minutes for part in chosen)
    lines.append(f"{len(chosen)} parts, about {total:.0f} minutes (estimates, not measured)")
    return "\n".join(lines)


def why_skipped(part: Part, gpu: bool) -> str:
    """Why this machine cannot run a part, "" if it can."""
    if part.gpu and not gpu:
        return f"{SKIPPED}: no Python here sees an NVIDIA GPU"
    return f"{SKIPPED}: {part.missing} is not installed" if part.missing else ""


def run(
    chosen: list[Part], out: Path, budget: float, *, gpu: bool = True, again: bool = True
) -> int:
    """Runs the parts within the budget and prints the table; 1 if a part did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = read_json(out / "lane.json").get("parts", {})
    started = time.monotonic()
    with open(out / "lane.log", "a") as log:
        for part in chosen:
            left = budget - (time.monotonic() - started)
            if reason := why_skipped(part, gpu):
                records[part.name] = {"status": reason, "seconds": 0.0}
            elif not again and records.get(part.name, {}).get("status") == "ok":
                continue
            elif left < 5:
                records[part.name] = {"status": "not run: out of budget", "seconds": 0.0}
            else:
                print(f"{part.name} ...", flush=True)
                limit = min(LIMIT_SECONDS, left)
                records[part.name] = run_part(part, limit, log, out / "site")
                merge_ops(out)
                records[part.name]["note"] = note(out, part.name)
            write_json(out / "lane.json", {"parts": records})
    print(f"\n{'part':30} {'seconds':>8}  result")
    kinds: Counter[str] = Counter()
    for part in chosen:
        record = records[part.name]
        result = "; ".join(filter(None, (record["status"], record.get("note", ""))))
        print(f"{part.name:30} {record['seconds']:8.1f}  {result}")
        kind = record["status"].partition(":")[0]
        kinds[kind if kind in ("ok", SKIPPED) else "failed"] += 1
    print(f"{kinds['ok']} ok, {kinds['failed']} failed, {kinds[SKIPPED]} skipped; results in {out}")
    return int(kinds["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
