"""``python -m benchmarks``: measure, compare two reports, plot one, model GPUs, gate a change."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sora_kernels.bench.ceilings import Ceilings

    from .registry import Case
    from .runner import Results

SECONDS = {"quick": 0.6, "full": 3.0}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(f"{message} (see python -m benchmarks --help)")


class Refused(SystemExit):
    """Bad input: one line on stderr, exit code 2."""


def _refuse(message: str) -> NoReturn:
    print(f"benchmarks: {' '.join(message.split())}", file=sys.stderr)
    raise Refused(2)


def _parser(command: str) -> argparse.ArgumentParser:
    if command == "compare":
        parser = _Parser(prog="python -m benchmarks compare", description="Did HEAD get slower?")
        parser.add_argument("base", metavar="BASE.json")
        parser.add_argument("head", metavar="HEAD.json")
        parser.add_argument(
            "--fail-over",
            type=float,
            default=5.0,
            metavar="PERCENT",
            help="exit 1 if any row is slower by more, beyond doubt (default 5)",
        )
        return parser
    if command == "plot":
        parser = _Parser(prog="python -m benchmarks plot", description="Plots of one report.")
        parser.add_argument("report", metavar="F.json")
        parser.add_argument("-o", "--out", required=True, metavar="DIR")
        return parser
    parser = _Parser(
        prog="python -m benchmarks",
        description="Times our ops against plain PyTorch, torch.compile and peers. "
        "Also: `compare BASE.json HEAD.json`, `plot F.json -o DIR`, `model`, `gate`.",
    )
    parser.add_argument("--suite", choices=("ops", "block", "e2e", "dropin", "all"), default="ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--only", metavar="NAME", help="an op, a glob over op/mode/case/dtype, A|B")
    parser.add_argument("--file", metavar="NAME", help="the cases of bench_NAME.py alone")
    parser.add_argument("--json", metavar="F", help="where to write the report")
    parser.add_argument("--skip", action="append", default=[], metavar="PROVIDER")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--seconds", type=float, metavar="S", help="measuring time per case")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    parser.add_argument(
        "--check", action="store_true", help="call every provider once and compare; time nothing"
    )
    return parser


def _writable(path: str) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        _refuse(f"--json: there is no directory {target.parent}")
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        _refuse(f"--json: cannot write {target}")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (0 fine, 1 a failure found, 2 bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "model":
        from .model import main as model

        return model(arguments[1:])
    if arguments and arguments[0] == "gate":
        from .gate import main as gate

        return gate(arguments[1:])
    command = arguments[0] if arguments and arguments[0] in ("compare", "plot") else "run"
    options = _parser(command).parse_args(arguments[1:] if command != "run" else arguments)
    if command == "compare":
        return _compare(options)
    if command == "plot":
        return _plot(options)
    return _run(options)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from sora_kernels.bench import compare, read_report

    from .table import print_comparison

    if not options.fail_over >= 0:
        _refuse(f"--fail-over must not be negative, got {options.fail_over}")
    try:
        result = compare(read_report(options.base), read_report(options.head))
    except ValueError as error:
        _refuse(str(error))
    print_comparison(result, options.fail_over, _console(Console))
    slower = [c for c in result.changes if c.regressed(options.fail_over)]
    if slower:
        print(f"{len(slower)} of {len(result.changes)} slower by over {options.fail_over:g}%")
    return 1 if slower else 0


def _plot(options: argparse.Namespace) -> int:
    from sora_kernels.bench import read_report
    from sora_kernels.bench.plot import plot

    try:
        written = plot(read_report(options.report), options.out, Path(options.report).stem)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    for path in written:
        print(path)
    return 0


def _console(kind: Any) -> Any:
    """A console that keeps its columns when the output goes to a file."""
    return kind(width=None if sys.stdout.isatty() else 140)


def _run(options: argparse.Namespace) -> int:
    target = _writable(options.json) if options.json else None
    if options.threads is not None and options.threads < 1:
        _refuse(f"--threads must be at least 1, got {options.threads}")
    if options.seconds is not None and not options.seconds > 0:
        _refuse(f"--seconds must be positive, got {options.seconds}")

    import torch
    from rich.console import Console

    from sora_kernels import explain
    from sora_kernels.bench import SCHEMA, write_report
    from sora_kernels.bench.env import describe

    from .pinned import PINNED
    from .registry import SUITES, Context, load
    from .runner import Results
    from .table import print_report

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        _refuse("--device cuda: this torch sees no CUDA device")
    torch.set_num_threads(options.threads or _cores())
    suites = SUITES if options.suite == "all" else (options.suite,)
    try:
        context = Context(device=device, quick=options.quick)
        cases = load(suites, context, options.only, options.file)
    except ValueError as error:
        _refuse(str(error))
    results = Results()
    if options.check:
        return _check(cases, device, set(options.skip), options.quiet)
    load_before = round(os.getloadavg()[0], 2)  # of others: this run has done nothing yet

    def report() -> dict[str, Any]:
        found: dict[str, Any] = {"skipped": results.skipped, "errors": results.errors}
        found |= {"backends": explain().splitlines(), "load_before": load_before}
        head = {"schema": SCHEMA, "env": env | found, "ceilings": ceilings.as_dict()}
        return {**head, "rows": results.rows}

    def save() -> None:
        if target and results.rows:
            try:
                write_report(target, report())
            except OSError as error:
                _refuse(f"--json: cannot write {target}: {error.strerror}")

    try:
        with _progress(options.quiet) as bar:
            task = bar.add_task("ceilings", total=len(cases))
            ceilings = _measure_ceilings(device, quick=options.quick)
            env = describe(device, quick=options.quick, variables=PINNED)
            seconds = options.seconds or SECONDS["quick" if options.quick else "full"]
            skip = set(options.skip)
            if device == "cpu":
                _run_cpu(cases, ceilings, seconds, skip, results, bar, task)
            else:
                _run_cuda(cases, ceilings, seconds, skip, results, bar, task, save)
    except KeyboardInterrupt:
        saved = target and results.rows and device == "cuda"
        kept = f"{target} holds what was done" if saved else "nothing written"
        print(f"benchmarks: interrupted, {kept}", file=sys.stderr)
        return 130
    _tell(results)
    if not results.rows:
        print("benchmarks: no case could be measured, nothing written", file=sys.stderr)
        return 1
    save()
    if not options.quiet:
        print_report(report(), _console(Console))
    return 1 if results.errors else 0


def _tell(results: Results) -> None:
    for failure in results.errors:
        print(f"benchmarks: {failure['case']}: {failure['error']}", file=sys.stderr)


def _check(cases: Sequence[Case], device: str, skip: set[str], quiet: bool) -> int:
    import torch._inductor.config as inductor

    from .runner import Results, check_case

    # Checks may run side by side: what Inductor's tuning finds meanwhile must not be remembered.
    inductor.autotune_local_cache = False
    results = Results()
    with _progress(quiet) as bar:
        task = bar.add_task("check", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            check_case(case, device=device, skip=skip, results=results)
            bar.advance(task)
    _tell(results)
    wrong = len({failure["case"].partition(",")[0] for failure in results.errors})
    print(f"{len(cases) - wrong} of {len(cases)} cases agree, {len(results.skipped)} peers skipped")
    return 1 if results.errors else 0


def _measure_ceilings(device: str, *, quick: bool) -> Ceilings:
    from sora_kernels.bench import measure_ceilings

    return measure_ceilings(device, quick=quick)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=quiet,
        redirect_stdout=False,
    )


def _run_cpu(
    cases: Sequence[Case],
    ceilings: Ceilings,
    seconds: float,
    skip: set[str],
    results: Results,
    bar: Progress,
    task: TaskID,
) -> None:
    from .pytest_cpu import Plan, run_plan

    run_plan(
        Plan(
            cases,
            ceilings,
            seconds=seconds,
            skip=skip,
            results=results,
            started=lambda case: bar.update(task, description=case.name),
            finished=lambda case: bar.advance(task),
        )
    )


def _run_cuda(
    cases: Sequence[Case],
    ceilings: Ceilings,
    seconds: float,
    skip: set[str],
    results: Results,
    bar: Progress,
    task: TaskID,
    save: Callable[[], None],
) -> None:
    """A report after every case: what was measured outlives a run that is stopped."""
    from sora_kernels.bench import measure_cuda

    from .runner import run_case

    for case in cases:
        bar.update(task, description=case.name)
        run_case(
            case,
            device="cuda",
            timer=lambda runs: measure_cuda(runs, seconds=seconds),
            ceilings=ceilings,
            skip=skip,
            results=results,
        )
        save()
        bar.advance(task)


if __name__ == "__main__":
    if not {*sys.argv[1:2]} & {"compare", "plot", "model", "gate"}:
        from .pinned import pin

        pin(sys.argv[1:])
    sys.exit(main())
