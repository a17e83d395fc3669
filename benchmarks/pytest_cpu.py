"""The CPU cases under pytest-benchmark, which holds the clock for all of them.

``python -m benchmarks --device cpu`` runs this file in its own process; on its own it times the
quick ops cases: ``pytest benchmarks/pytest_cpu.py --benchmark-only``.

One pytest item is one case, not one provider. pytest-benchmark has no notion of timing several
functions in turn, but ``pedantic`` calls ``setup`` before every round, outside the clock: there
the next provider is chosen. So every round is timed by pytest-benchmark (its timer, the garbage
collector off), providers alternate, and the recorded rounds are dealt out to them afterwards.
The statistics in pytest-benchmark's own table are therefore over all providers of a case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from sora_kernels.bench.ceilings import Ceilings, measure_ceilings
from sora_kernels.bench.timing import Run, measure

from .registry import Case, Context, load
from .runner import Results, run_case


@dataclass
class Plan:
    """A plugin that carries the cases in and the results out."""

    cases: Sequence[Case]
    ceilings: Ceilings | None = None
    seconds: float = 0.5
    skip: set[str] = field(default_factory=set)
    results: Results = field(default_factory=Results)
    started: Callable[[Case], None] = lambda case: None
    finished: Callable[[Case], None] = lambda case: None


_PLAN = "sora_kernels_plan"


def _plan(config: pytest.Config) -> Plan:
    plan = config.pluginmanager.get_plugin(_PLAN)
    if plan is None:
        plan = Plan(load(["ops"], Context(quick=True)))
        config.pluginmanager.register(plan, _PLAN)
    assert isinstance(plan, Plan)
    return plan


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan = _plan(metafunc.config)
    metafunc.parametrize("case", plan.cases, ids=[case.name for case in plan.cases])


def test_case(case: Case, benchmark: Any, request: pytest.FixtureRequest) -> None:
    plan = _plan(request.config)
    if plan.ceilings is None:
        plan.ceilings = measure_ceilings("cpu", quick=True)

    def drive(
        target: Callable[..., None], setup: Callable[[], tuple[Run, int]], rounds: int
    ) -> Sequence[float]:
        benchmark.group = case.op
        benchmark.pedantic(target, setup=lambda: (setup(), {}), rounds=rounds)
        return list(benchmark.stats.stats.data)

    def timer(runs: Mapping[str, Run]) -> Mapping[str, list[float]]:
        return measure(runs, seconds=plan.seconds, drive=drive)

    plan.started(case)
    failures = len(plan.results.errors)
    run_case(
        case,
        device="cpu",
        timer=timer,
        ceilings=plan.ceilings,
        skip=plan.skip,
        results=plan.results,
    )
    plan.finished(case)
    if len(plan.results.errors) > failures:
        pytest.fail(plan.results.errors[-1]["error"], pytrace=False)


def run_plan(plan: Plan) -> str:
    """Runs the plan's cases under pytest in this process; returns what pytest printed.

    pytest's configuration files and other plugins stay out of it: they are the tests', not ours.

    Raises:
        KeyboardInterrupt: the run was interrupted.
        RuntimeError: pytest itself failed (not a case: those are in ``plan.results.errors``).
    """
    import contextlib
    import io
    import os

    class Carrier:
        @pytest.hookimpl(tryfirst=True)
        def pytest_configure(self, config: pytest.Config) -> None:
            config.pluginmanager.register(plan, _PLAN)

    printed = io.StringIO()
    arguments = [__file__, "-q", "-s", "-c", "/dev/null", "--rootdir", __file__.rpartition("/")[0]]
    arguments += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    arguments += ["--benchmark-only", "--benchmark-disable-gc", "--benchmark-columns=median"]
    arguments += ["-o", "python_files=pytest_cpu.py", "-W", "ignore"]
    # As the child of an xdist worker pytest-benchmark would refuse to time anything.
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
    try:
        with contextlib.redirect_stdout(printed):
            code = pytest.main(arguments, plugins=[Carrier()])
    finally:
        if worker is not None:
            os.environ["PYTEST_XDIST_WORKER"] = worker
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}:\n{printed.getvalue()}")
    return printed.getvalue()
