"""The command `python -m sora_kernels.aot`."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import ARCHS, nvcc
from . import __doc__ as description
from .checking import SMEM_LIMIT
from .matrix import Task, find_modules, load_cases, run


def format_table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield f"{'kernel':44} {'arch':>4} {'regs':>4} {'spill':>5} {'smem':>6}  {'ok':3} notes"
    for row in rows:
        notes = "; ".join(row["problems"]) or " ".join(row["features"])
        yield (
            f"{row['kernel']:44} {row['arch']:4} {row['regs']:4} {row['spill_bytes']:5} "
            f"{row['smem']:6}  {'ok' if row['ok'] else 'NO':3} {notes}"
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sora_kernels.aot",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=list(ARCHS),
        metavar="CC",
        choices=sorted(SMEM_LIMIT),
        help="compute capabilities",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="these ops only")
    parser.add_argument(
        "--module",
        nargs="+",
        default=[],
        metavar="M",
        help="check aot_cases() of these modules instead of the ops",
    )
    parser.add_argument(
        "--nvcc", action="store_true", help="check the kernels of csrc/cuda as well, with nvcc"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--no-cache", action="store_true", help="compile everything again")
    parser.add_argument("--quiet", action="store_true", help="print only problems and the total")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    return args


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return _refuse("TRITON_INTERPRET is set; interpreted kernels cannot be compiled")
    if importlib.util.find_spec("triton") is None:
        return _refuse("triton is not installed, so there is nothing to compile with")
    if args.json and not args.json.parent.is_dir():
        return _refuse(f"--json: expected a file in an existing folder, got {args.json}")
    try:
        modules = args.module or find_modules(args.only)
        tasks = [
            Task(module, case.name, arch)
            for module in modules
            for case in load_cases(module).values()
            for arch in args.arch
            if arch in case.archs or arch not in ARCHS
        ]
        if not tasks:
            raise ValueError(f"no kernel is meant for --arch {args.arch}")
        show = sys.stderr.isatty() and not args.quiet

        done = itertools.count(1)

        def report() -> None:
            if show:
                print(f"\r{next(done)}/{len(tasks)} kernels", end="", file=sys.stderr, flush=True)

        rows = run(tasks, args.jobs, not args.no_cache, report)
        cuda_note = ""
        if args.nvcc:
            cuda, cuda_note = nvcc.cuda_rows(args.arch, args.only, args.jobs, not args.no_cache)
            rows += cuda
        if args.json:
            temporary = args.json.with_name(args.json.name + ".tmp")
            temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            temporary.replace(args.json)
    except (ImportError, OSError, ValueError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; what was compiled is cached", file=sys.stderr)
        return 130
    if show:
        print(file=sys.stderr)
    bad = [row for row in rows if not row["ok"]]
    for line in format_table(bad if args.quiet else rows):
        if not args.quiet or bad:
            print(line)
    if cuda_note and not args.quiet:
        print(cuda_note)
    print(f"{len(rows) - len(bad)} of {len(rows)} ok")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
