"""One case: what ends it, what only costs a peer its row, and what a stopped GPU run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import runner
from benchmarks.registry import Case, op_cases
from benchmarks.runner import Results, check_case, run_case
from sora_kernels.bench import read_report

from .reports import CEILINGS


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _wrong(x: torch.Tensor) -> torch.Tensor:
    return x * 2.1


def _broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory\nand a page of advice")


def case(ours: Any = _double, **peers: Any) -> Case:
    (made,) = op_cases(
        "toy", "8x4", "fp32", inputs=lambda device: {"x": torch.ones(8, 4)}, ours=ours,
        plain=_double, bytes={"fwd": 256}, flops={"fwd": 32}, peers=peers, compile=False,
    )  # fmt: skip
    return made


def measured(made: Case) -> Results:
    results = Results()
    run_case(
        made, device="cpu", timer=lambda runs: {name: [1.0, 1.0] for name in runs},
        ceilings=CEILINGS, skip=set(), results=results,
    )  # fmt: skip
    return results


def test_a_failing_peer_costs_its_own_row_only() -> None:
    results = measured(case(peer=_broken, other=_wrong, good=_double))
    assert [row["provider"] for row in results.rows] == ["sora_kernels", "plain", "good"]
    assert results.errors[0] == {
        "case": "toy/fwd/8x4/fp32, peer", "error": "RuntimeError: out of memory",
    }  # fmt: skip
    assert results.errors[1]["error"].startswith("Disagreement: other differs from plain by 5")


@pytest.mark.parametrize("ours", [_wrong, _broken])
def test_a_failure_of_ours_ends_the_case(ours: Any) -> None:
    results = measured(case(ours=ours))
    assert not results.rows and len(results.errors) == 1


def test_a_check_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_measure", None)
    results = Results()
    check_case(case(peer=_wrong), device="cpu", skip=set(), results=results)
    check_case(case(), device="cpu", skip=set(), results=results)
    assert not results.rows and len(results.errors) == 1


def test_a_stopped_gpu_run_leaves_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "_measure_ceilings", lambda device, quick: CEILINGS)
    monkeypatch.setattr("sora_kernels.bench.env.describe", lambda *a, **k: {"device": "cuda"})
    monkeypatch.setattr("benchmarks.registry.load", lambda *a: [case(), case()])
    calls: list[Any] = []

    def first_alone(made: Case, **options: Any) -> None:
        calls.append(made)
        if len(calls) == 2:
            raise KeyboardInterrupt
        options["results"].rows += measured(made).rows

    monkeypatch.setattr(runner, "run_case", first_alone)
    path = tmp_path / "f.json"
    threads = str(torch.get_num_threads())
    assert (
        command.main(["--device", "cuda", "--quiet", "--json", str(path), "--threads", threads])
        == 130
    )
    assert capsys.readouterr().err == f"benchmarks: interrupted, {path} holds what was done\n"
    assert [row["provider"] for row in read_report(path)["rows"]] == ["sora_kernels", "plain"]
