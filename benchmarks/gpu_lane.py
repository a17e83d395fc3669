"""Runs the parts of the GPU lane, each with a time limit; `gpu_lane.sh` starts this.

Parts are independent: each is a process of its own, or several, and can be run alone into the same
folder. What ended well is not run again into it, unless it is named or `--again` is given; the
build is, because another machine lacks it, and costs seconds where it is up to date. A build that
fails costs the ahead-of-time CUDA kernels alone. Where there is no GPU, the parts that need one are
skipped and counted. The folder then holds `lane.json` (what ran, how long, how it ended),
`lane.log` (all output), `info.json`, `ceilings.json`, `test-*.xml`, the reports `ops.json`,
`block.json`, `e2e.json` and `dropin.json`, and `tables/`. `--archive F` packs it into one file
after every part, for machines that end without notice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import IO, Any

from .gpu_lane_parts import ROOT, Part, parts, refuse_wheels, select, tool

LIMIT_SECONDS = 520  # a part must end well within nine minutes
SKIPPED = "skipped"  # how the status of a part begins that this machine cannot run
BUDGET = "not run: out of budget"
KEY = ("op", "mode", "case", "dtype")


def environment(gpu: bool, site: Path) -> dict[str, str]:
    """Of every command. Compiles for this GPU alone; ``site`` holds further packages, if any."""
    build = "cuda" if any((ROOT / "csrc" / "cuda").glob("*.cu")) else "cpu"  # fails loudly
    made = {"SORA_KERNELS_BUILD": build, **os.environ}
    made |= {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    if gpu and "TORCH_CUDA_ARCH_LIST" not in made and (chip := capability()):
        made["TORCH_CUDA_ARCH_LIST"] = chip
    if "CUDA_HOME" not in made and (nvcc := tool("nvcc")):
        made["CUDA_HOME"] = str(Path(nvcc).resolve().parents[1])
    if site.is_dir():
        paths = (str(site), os.environ.get("PYTHONPATH"))
        made["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return made


def capability() -> str:
    """Of the first GPU, such as "9.0"; "" if the driver does not say."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_part(
    part: Part, seconds: float, log: IO[str], inherited: Mapping[str, str]
) -> dict[str, Any]:
    """Runs the commands with their output in the log; the record says how it ended."""
    started = time.monotonic()
    own = dict(inherited)
    if part.parallel or "-n" in part.commands[0]:  # as many processes as cores already
        own.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

    def start(command: tuple[str, ...], output: IO[Any]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=output, stderr=output, start_new_session=True
        )

    def finish(process: subprocess.Popen[bytes]) -> str:
        try:
            code = process.wait(timeout=max(1.0, seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
        return "ok" if code == 0 else f"exit code {code}"

    found = ["ok"]
    if part.parallel:
        outputs = [tempfile.TemporaryFile() for _ in part.commands]
        running = [start(*pair) for pair in zip(part.commands, outputs, strict=True)]
        try:
            found = [finish(process) for process in running]
        finally:
            for process in running:
                _end(process)
        for command, output in zip(part.commands, outputs, strict=True):
            output.seek(0)
            text = output.read().decode(errors="replace")
            log.write(f"\n== {part.name}: {' '.join(command)}\n{text}")
            output.close()
    else:
        for command in part.commands:
            log.write(f"\n== {part.name}: {' '.join(command)}\n")
            log.flush()
            found = [finish(start(command, log))]
            if found != ["ok"]:
                break
    wrong = [status for status in found if status != "ok"]
    of = f" ({len(wrong)} of {len(found)} commands)" if len(found) > 1 and wrong else ""
    status = wrong[0] + of if wrong else "ok"
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
    """Joins the reports of single files of ops into `ops.json`, in place of its rows of the same
    cases."""
    merged = read_json(out / "ops.json")
    for path in sorted(out.glob("ops-*.json")):
        report = json.loads(path.read_text())
        fresh = {_key(row) for row in report["rows"]}
        old = [row for row in merged.get("rows", []) if _key(row) not in fresh]
        for name in ("skipped", "errors"):  # of cases; those of earlier files stay
            new = report.setdefault("env", {}).setdefault(name, [])
            new[:0] = [one for one in merged.get("env", {}).get(name, []) if one not in new]
        merged = {**report, "rows": old + report["rows"]}
        path.unlink()
    if merged:
        write_json(out / "ops.json", merged)


def note(out: Path, name: str) -> str:
    """The result of a part in a few words; of tests also which ones failed."""
    if (out / f"{name}.xml").is_file():
        return _tests(ElementTree.parse(out / f"{name}.xml"))
    rows = read_json(out / f"{name}.json").get("rows", [])
    if not rows:
        return ""
    ours = {_key(r): r["p50_ms"] for r in rows if r["provider"] == "sora_kernels"}
    words = [f"{len(rows)} rows"]
    own = [r for r in rows if r["provider"] == "sora_kernels"]
    if own:
        words.append(f"median roofline {median(r['roofline'] for r in own):.2f}")
        words.append(f"best {max(r['tflops'] for r in own):.3g} TFLOP/s")
    for provider in sorted({r["provider"] for r in rows} - {"sora_kernels"}):
        pairs = [
            r["p50_ms"] / ours[_key(r)]
            for r in rows
            if r["provider"] == provider and ours.get(_key(r))
        ]
        words += [f"{median(pairs):.2f}x {provider}"] if pairs else []
    return ", ".join(words)


def _tests(found: Any, most: int = 12) -> str:
    suite = found.getroot().find("testsuite")
    if suite is None:
        return ""
    counts = ("tests", "failures", "errors", "skipped")
    words = ", ".join(f"{suite.get(count)} {count}" for count in counts)
    failed = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            problem = case.find(kind)
            if problem is not None:
                lines = (problem.get("message") or "").strip().splitlines() or [""]
                failed.append(f"\n    {case.get('name')}: {lines[0][:120]}")
    more = f"\n    and {len(failed) - most} more" if len(failed) > most else ""
    return words + "".join(failed[:most]) + more


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def pack(out: Path, archive: Path) -> None:
    """All results but the unpacked wheels, in one file; written beside and renamed."""
    temporary = archive.with_name(archive.name + ".tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.name != "site":
                tar.add(path, arcname=path.name)
    temporary.replace(archive)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_lane.sh", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="start no part that would take much longer than what is left of this (default 30)",
    )
    parser.add_argument("--part", action="append", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few benchmark cases")
    parser.add_argument("--again", action="store_true", help="also what ended well before")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="peers, installed into --out")
    parser.add_argument("--archive", type=Path, metavar="F", help="pack the results (tar.gz)")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--no-gpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not args.list:
        parser.error("--out: expected a folder for the results")
    if not args.budget > 0:
        parser.error(f"--budget: expected minutes above 0, got {args.budget:g}")
    if args.wheels and (reason := refuse_wheels(args.wheels)):
        parser.error(reason)
    if args.archive and not args.archive.resolve().parent.is_dir():
        parser.error(f"--archive: there is no folder {args.archive.resolve().parent}")
    out = args.out.resolve() if args.out else Path("DIR")
    # A list is of what a GPU machine runs, wherever it is asked for.
    every = parts(out, args.quick, args.wheels, gpu=args.list or not args.no_gpu)
    try:
        chosen = select(every, args.part)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        print(listing(chosen))
        return 0
    again = args.again or bool(args.part)
    gpu, budget = not args.no_gpu, args.budget * 60
    return run(chosen, out, budget, gpu=gpu, again=again, archive=args.archive)


def listing(chosen: list[Part]) -> str:
    """One line per part: what it is called, how long it and all up to it should take, what it
    runs."""
    lines = [f"{'part':32} {'minutes':>7} {'so far':>7}  commands"]
    total = 0.0
    for part in chosen:
        total += part.minutes
        text = (" & " if part.parallel else " && ").join(map(" ".join, part.commands))
        text = " ".join(text.replace(sys.executable, "python").split())
        lines.append(f"{part.name:32} {part.minutes:7.1f} {total:7.1f}  {text[:150]}")
    lines.append(f"{len(chosen)} parts, about {total:.0f} minutes (estimates, not measured)")
    return "\n".join(lines)


def why_skipped(part: Part, gpu: bool) -> str:
    """Why this machine cannot run a part, "" if it can."""
    if part.gpu and not gpu:
        return f"{SKIPPED}: no Python here sees an NVIDIA GPU"
    return f"{SKIPPED}: {part.missing} is not installed" if part.missing else ""


def run(
    chosen: list[Part], out: Path, budget: float, *, gpu: bool = True, again: bool = True,
    archive: Path | None = None,
) -> int:  # fmt: skip
    """Runs the parts within the budget and prints the table; 1 if a part did not end well."""
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = read_json(out / "lane.json").get("parts", {})
    started = time.monotonic()
    with open(out / "lane.log", "a") as log:
        for part in chosen:
            left = budget - (time.monotonic() - started)
            done = records.get(part.name, {}).get("status") == "ok"
            if reason := why_skipped(part, gpu):
                records[part.name] = {"status": reason, "seconds": 0.0}
            elif done and not again and not part.always:
                continue
            elif left < max(5, 0.5 * 60 * part.minutes):  # what is cut in half may say nothing
                if not done:
                    records[part.name] = {"status": BUDGET, "seconds": 0.0}
            else:
                print(f"{part.name} ...", flush=True)
                inherited = environment(gpu, out / "site")  # which a part may have made
                record = run_part(part, min(LIMIT_SECONDS, left), log, inherited)
                records[part.name] = {**record, "note": note(out, part.name)}
                merge_ops(out)
            log.flush()
            write_json(out / "lane.json", {"parts": records})
            if archive is not None:
                pack(out, archive)
    return summary(chosen, records, out)


def summary(chosen: list[Part], records: Mapping[str, Any], out: Path) -> int:
    """Prints the table; 1 if a part did not end well."""
    print(f"\n{'part':32} {'seconds':>8}  result")
    kinds: Counter[str] = Counter()
    for part in chosen:
        record = records[part.name]
        result = "; ".join(filter(None, (record["status"], record.get("note", ""))))
        print(f"{part.name:32} {record['seconds']:8.1f}  {result}")
        kind = record["status"].partition(":")[0]
        kinds[kind if kind in ("ok", SKIPPED) else "failed"] += 1
    print(f"{kinds['ok']} ok, {kinds['failed']} failed, {kinds[SKIPPED]} skipped; results in {out}")
    return int(kinds["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
