"""The GPU lane's own machinery, which runs anywhere: selection, limits, records, the table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_lane
from benchmarks.gpu_lane import Part, merge_ops, note, parts, run, select

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the lane would run")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu_lane.sh"), "--out", str(tmp_path / "lane")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "would run" in result.stdout and "-m pytest -q -m gpu" in result.stdout
    assert not (tmp_path / "lane").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no-gpu", "--part", "nonsense"], "--part: expected one of build"),
        (["--list", "--budget", "0"], "--budget: expected minutes above 0, got 0"),
        ([], "--out: expected a folder"),
    ],
)
def test_bad_input_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = gpu_lane.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_every_benchmark_has_a_part(tmp_path: Path) -> None:
    names = [part.name for part in parts(tmp_path, quick=True)]
    files = (ROOT / "benchmarks").glob("bench_*.py")
    assert {f"ops-{p.stem.removeprefix('bench_')}" for p in files} <= set(names)
    assert {"build", "test", "block", "e2e"} <= set(names)
    chosen = [part.name for part in select(parts(tmp_path, quick=True), ["ops", "build"])]
    assert chosen == [n for n in names if n == "build" or n.startswith("ops-")]


def test_a_failed_and_a_slow_part_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_lane, "LIMIT_SECONDS", 1)
    chosen = [
        Part("fails", ((PYTHON, "-c", "print('first'); raise SystemExit(3)"), (PYTHON, "-c", ""))),
        Part("hangs", ((PYTHON, "-c", "import time; time.sleep(60)"),)),
        Part("works", ((PYTHON, "-c", "print('fine')"),)),
    ]
    assert run(chosen, tmp_path / "out", budget=60) == 1
    records = json.loads((tmp_path / "out" / "lane.json").read_text())["parts"]
    assert [r["status"] for r in records.values()] == ["exit code 3", "stopped after 1 s", "ok"]
    log = (tmp_path / "out" / "lane.log").read_text()
    assert "first" in log and "fine" in log
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].startswith("fails") and last[2].split()[-1] == "ok"
    assert run(chosen[2:], tmp_path / "out", budget=60) == 0  # earlier records stay
    assert len(json.loads((tmp_path / "out" / "lane.json").read_text())["parts"]) == 3


def test_out_of_budget_is_recorded_and_is_a_failure(tmp_path: Path) -> None:
    assert run([Part("late", ((PYTHON, "-c", ""),))], tmp_path, budget=1) == 1
    record = json.loads((tmp_path / "lane.json").read_text())["parts"]["late"]
    assert record["status"] == "not run: out of budget"


def _row(op: str, provider: str, p50: float, roofline: float = 0.5) -> dict[str, Any]:
    return {"suite": "ops", "op": op, "mode": "fwd", "case": "c", "dtype": "bf16",
            "provider": provider, "p50_ms": p50, "roofline": roofline}  # fmt: skip


def test_reports_of_single_ops_are_joined_and_summarised(tmp_path: Path) -> None:
    first = [_row("a", "sora_kernels", 1.0, 0.8), _row("a", "plain", 3.0)]
    (tmp_path / "ops-a.json").write_text(json.dumps({"schema": 1, "rows": first}))
    merge_ops(tmp_path)
    second = [_row("b", "sora_kernels", 2.0), _row("b", "plain", 2.0)]
    (tmp_path / "ops-b.json").write_text(json.dumps({"schema": 1, "rows": second}))
    merge_ops(tmp_path)
    again = [_row("a", "sora_kernels", 0.5, 0.9), _row("a", "plain", 2.0)]
    (tmp_path / "ops-a.json").write_text(json.dumps({"schema": 1, "rows": again}))
    merge_ops(tmp_path)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert [r["op"] for r in rows] == ["b", "b", "a", "a"]
    assert [p.name for p in tmp_path.iterdir()] == ["ops.json"]
    assert note(tmp_path, "ops-a") == "2 rows, median roofline 0.90, 4.00x plain"
    assert note(tmp_path, "ops-b") == "2 rows, median roofline 0.50, 1.00x plain"
    assert note(tmp_path, "block") == ""


def test_summary_of_the_tests(tmp_path: Path) -> None:
    xml = '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    (tmp_path / "test.xml").write_text(xml)
    assert note(tmp_path, "test") == "9 tests, 1 failures, 0 errors, 2 skipped"
