"""All cases of all ops on all architectures, compiled by a pool of processes."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import AotCase
from .checking import check
from .compiling import cache_path, compile_case, load, save


@dataclass(frozen=True)
class Task:
    """Picklable name of one compilation: the case is looked up again in the worker."""

    module: str
    case: str
    arch: int


def find_modules(only: Iterable[str] = ()) -> list[str]:
    """Kernel modules of all ops, or of those named."""
    ops = Path(__file__).parents[1] / "ops"
    found = sorted(path.parent.name for path in ops.glob("*/kernels.py"))
    if unknown := [op for op in only if op not in found]:
        raise ValueError(f"--only: expected one of {', '.join(found)}, got {', '.join(unknown)}")
    return [f"sora_kernels.ops.{op}.kernels" for op in (only or found)]


_cases: dict[str, dict[str, AotCase]] = {}


def load_cases(module: str) -> dict[str, AotCase]:
    """The module's cases by name; ValueError if it has none or they are malformed."""
    if module not in _cases:
        cases: list[AotCase] = getattr(importlib.import_module(module), "aot_cases", list)()
        if not cases:
            raise ValueError(f"{module}: expected aot_cases() to list kernels, got none")
        named = {case.name: case for case in cases}
        if len(named) != len(cases):
            raise ValueError(f"{module}: aot_cases() names are not unique")
        for case in cases:
            case.validate()
        _cases[module] = named
    return _cases[module]


def _row(task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
    case = load_cases(task.module)[task.case]
    module = task.module.split(".")
    op = module[-2] if module[-1] == "kernels" else module[-1]
    return {"kernel": f"{op}/{case.name}", "arch": task.arch, "config": case.config, **facts}


def _failed(problem: str) -> dict[str, Any]:
    empty = {"regs": 0, "stack": 0, "spill_bytes": 0, "smem": 0, "features": [], "counts": {}}
    return {**empty, "problems": [problem], "ok": False}


def cached_row(task: Task) -> dict[str, Any] | None:
    """The checked row if this very kernel was compiled before, else None."""
    case = load_cases(task.module)[task.case]
    compiled = load(cache_path(case, task.arch))
    if compiled is None:
        return None
    return _row(task, check(case, task.arch, compiled) | {"cached": True, "seconds": 0.0})


def compiled_row(task: Task) -> dict[str, Any]:
    """Compile and check one case; a kernel that does not compile becomes a row that is not ok."""
    case = load_cases(task.module)[task.case]
    started = time.perf_counter()
    try:
        compiled = compile_case(case, task.arch)
    except OSError:
        raise
    except Exception as error:  # Triton has no common base class for what its passes raise
        message = f"{type(error).__name__}: {error}".strip().splitlines()
        facts = _failed("does not compile: " + " ".join(message[:3])[:300])
    else:
        save(cache_path(case, task.arch), compiled)
        facts = check(case, task.arch, compiled)
    seconds = round(time.perf_counter() - started, 2)
    return _row(task, facts | {"cached": False, "seconds": seconds})


def _compile_all(tasks: list[Task], jobs: int, report: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of `tasks` from a pool of processes; BrokenProcessPool if the compiler kills one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        futures = [pool.submit(compiled_row, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                report()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def run(
    tasks: list[Task], jobs: int, use_cache: bool = True, report: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """All rows, in the order of `tasks`; `report()` is called as each is finished."""
    rows: dict[Task, dict[str, Any]] = {}
    for task in tasks if use_cache else ():
        row = cached_row(task)
        if row is not None:
            rows[task] = row
            report()
    missing = [task for task in tasks if task not in rows]
    try:
        if missing:
            rows |= zip(missing, _compile_all(missing, jobs, report), strict=True)
    except BrokenProcessPool:
        # An assertion inside LLVM ends the process. Find out whose it is, one at a time.
        for task in missing:
            try:
                rows[task] = cached_row(task) or _compile_all([task], 1, report)[0]
            except BrokenProcessPool:
                rows[task] = _row(task, _failed("the compiler crashed") | {"cached": False})
    return [rows[task] for task in tasks]
