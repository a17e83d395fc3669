"""The GPU lane's own machinery, which runs anywhere: selection, limits, records, the table."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_lane
from benchmarks.gpu_lane import merge_ops, note, run
from benchmarks.gpu_lane_parts import Part, parts, refuse_wheels, select
from benchmarks.registry import SUITES, Context, load

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
QUICK = (PYTHON, "-I", "-S")  # starts in no time


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the lane would run")
def test_without_a_gpu_it_runs_the_rest_and_counts_what_it_skips(tmp_path: Path) -> None:
    """Every op once on the CPU; the scripts of the GPU parts are reached by the other tests."""
    out = tmp_path / "lane"
    command = [str(ROOT / "benchmarks" / "gpu_lane.sh"), "--out", str(out)]
    command += ["--archive", str(tmp_path / "lane.tgz")]
    env = {**os.environ, "PYTHON": PYTHON}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    records = json.loads((out / "lane.json").read_text())["parts"]
    ran = {name: record for name, record in records.items() if record["status"] == "ok"}
    assert list(ran) == ["smallest"] and len(records) > 30
    skipped = [record["status"] for name, record in records.items() if name not in ran]
    assert set(skipped) == {"skipped: no Python here sees an NVIDIA GPU"}
    with tarfile.open(tmp_path / "lane.tgz") as tar:
        assert set(tar.getnames()) == {"lane.json", "lane.log"}
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"1 ok, 0 failed, {len(skipped)} skipped")
    log = (out / "lane.log").read_text()
    for op in ("norm_modulate", "windowed_attention", "guided_step"):
        assert f"{op} bfloat16: (" in log


def test_list_says_what_would_run_and_for_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_lane.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    every = parts(Path("DIR"), quick=False)
    assert [line.split()[0] for line in lines[1:-1]] == [part.name for part in every]
    assert all(0 < part.minutes <= 9 for part in every)
    assert lines[-1].startswith(f"{len(every)} parts, about ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--list", "--part", "nonsense"], "--part: expected one of build, smallest"),
        (["--list", "--archive", "no/such/lane.tgz"], "--archive: there is no folder"),
        (["--list", "--wheels", "docs"], "--wheels: expected a folder with"),
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
    files = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")}
    assert {f"ops-{name}" for name in files - {"planner"}} <= set(names)
    assert {"block", "e2e", "dropin", "test-graph", "libraries", "check"} <= set(names)
    assert {"sanitize-memcheck", "sanitize-racecheck", "ceilings", "test-ops"} <= set(names)
    chosen = [part.name for part in select(parts(tmp_path, quick=True), ["ops"])]
    assert chosen == [n for n in names if n == "build" or n.startswith("ops-")]
    assert names.index("test-attention") < names.index("ops-norm_modulate") < names.index("block")
    assert names.index("ops-windowed_attention") < names.index("tune-norm_modulate")
    tested = {a for p in parts(tmp_path, quick=True) for c in p.commands for a in c}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files <= tested


def test_every_benchmark_command_finds_cases(tmp_path: Path) -> None:
    """What a part asks `python -m benchmarks` for exists on a GPU; declaring it needs none."""
    from benchmarks.__main__ import _parser

    commands = [c for p in parts(tmp_path, quick=False) for c in p.commands if "--device" in c]
    commands = [c for c in commands if c[2] == "benchmarks"]
    assert len(commands) > 20
    seen: set[str] = set()
    for command in commands:
        options = _parser("run").parse_args(command[3:])
        assert options.device == "cuda"
        found = load((options.suite,), Context("cuda"), options.only, options.file)
        assert found, command
        seen |= {case.op for case in found} if options.json else set()
    everything = {case.op for case in load(SUITES[:3], Context("cuda"))}
    assert everything - seen == {"planner"}


def test_it_compiles_for_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu_lane, "capability", lambda: "9.0")
    assert gpu_lane.environment(True, tmp_path / "site")["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "TORCH_CUDA_ARCH_LIST" not in gpu_lane.environment(False, tmp_path / "site")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu_lane.environment(True, tmp_path / "site")["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_commands_side_by_side_end_together(tmp_path: Path) -> None:
    say = (
        "import sys, time; time.sleep(0.2); print('said', sys.argv[1]); sys.exit(int(sys.argv[1]))"
    )
    commands = tuple((PYTHON, "-I", "-S", "-c", say, code) for code in ("0", "3", "0"))
    assert run([Part("side", commands, parallel=True)], tmp_path, budget=60) == 1
    record = json.loads((tmp_path / "lane.json").read_text())["parts"]["side"]
    assert record["status"] == "exit code 3 (1 of 3 commands)"
    assert "said 0" in (tmp_path / "lane.log").read_text()


def test_a_machine_is_prepared_again_and_no_part_is_begun_that_cannot_end(tmp_path: Path) -> None:
    chosen = [
        Part("build", ((PYTHON, "-I", "-S", "-c", "print('built')"),), always=True),
        Part("long", ((PYTHON, "-I", "-S", "-c", ""),), minutes=3),
        Part("short", ((PYTHON, "-I", "-S", "-c", ""),), minutes=1),
    ]
    for _ in range(2):
        assert run(chosen, tmp_path, budget=60, again=False) == 1
    assert (tmp_path / "lane.log").read_text().splitlines().count("built") == 2
    records = json.loads((tmp_path / "lane.json").read_text())["parts"]
    assert [r["status"] for r in records.values()] == ["ok", gpu_lane.BUDGET, "ok"]


def test_wheels_are_unpacked_where_the_parts_look(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.11.0-cp312-cp312-linux_x86_64.whl").touch()
    assert "would replace the machine's own" in str(refuse_wheels(wheels))
    (wheels / "torch-2.11.0-cp312-cp312-linux_x86_64.whl").rename(
        wheels / "peer-1-py3-none-any.whl"
    )
    assert refuse_wheels(wheels) is None
    first = parts(tmp_path, quick=True, wheels=wheels)[0]
    assert first.name == "wheels" and "--no-index" in first.commands[0]
    (wheels / "diffusers-0.42.1-py3-none-any.whl").touch()  # what it brings is not missing
    assert not any(part.missing == "diffusers" for part in parts(tmp_path, True, wheels))
    site = tmp_path / "site"
    site.mkdir()
    (site / "peer.py").write_text("print('found the peer')")
    assert run([Part("peer", ((PYTHON, "-m", "peer"),))], tmp_path, budget=60) == 0
    assert "found the peer" in (tmp_path / "lane.log").read_text()


def test_a_failed_and_a_slow_part_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_lane, "LIMIT_SECONDS", 6)
    chosen = [
        Part("fails", ((*QUICK, "-c", "print('first'); raise SystemExit(3)"), (*QUICK, "-c", ""))),
        Part("hangs", ((*QUICK, "-c", "import time; time.sleep(60)"),)),
        Part("works", ((*QUICK, "-c", "print('fine')"),)),
    ]
    assert run(chosen, tmp_path / "out", budget=60) == 1
    records = json.loads((tmp_path / "out" / "lane.json").read_text())["parts"]
    assert [r["status"] for r in records.values()] == ["exit code 3", "stopped after 6 s", "ok"]
    log = (tmp_path / "out" / "lane.log").read_text()
    assert "first" in log and "fine" in log
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].startswith("fails") and last[2].split()[-1] == "ok"
    assert last[3].startswith("1 ok, 2 failed, 0 skipped")
    assert run(chosen[2:], tmp_path / "out", budget=60, again=False) == 0  # earlier records stay
    assert "works ..." not in capsys.readouterr().out  # and what ended well is not run again
    assert len(json.loads((tmp_path / "out" / "lane.json").read_text())["parts"]) == 3


def test_out_of_budget_is_recorded_and_is_a_failure(tmp_path: Path) -> None:
    assert run([Part("late", ((PYTHON, "-c", ""),))], tmp_path, budget=1) == 1
    record = json.loads((tmp_path / "lane.json").read_text())["parts"]["late"]
    assert record["status"] == "not run: out of budget"


def _row(op: str, provider: str, p50: float, roofline: float = 0.5) -> dict[str, Any]:
    return {"suite": "ops", "op": op, "mode": "fwd", "case": "c", "dtype": "bf16",
            "provider": provider, "p50_ms": p50, "roofline": roofline, "tflops": 7}  # fmt: skip


def test_reports_of_single_ops_are_joined_and_summarised(tmp_path: Path) -> None:
    first = [_row("a", "sora_kernels", 1.0, 0.8), _row("a", "plain", 3.0)]
    (tmp_path / "ops-a.json").write_text(json.dumps({"schema": 1, "rows": first}))
    merge_ops(tmp_path)
    second = [_row("b", "sora_kernels", 2.0), _row("b", "plain", 2.0)]
    (tmp_path / "ops-b.json").write_text(json.dumps({"schema": 1, "rows": second}))
    merge_ops(tmp_path)
    again = [_row("a", "sora_kernels", 0.5, 0.9), _row("a", "plain", 2.0)]
    (tmp_path / "ops-a.json").write_text(json.dumps({"schema": 1, "rows": again}))
    assert note(tmp_path, "ops-a") == ("2 rows, median roofline 0.90, best 7 TFLOP/s, 4.00x plain")
    merge_ops(tmp_path)
    other = [{**_row("a", "sora_kernels", 1.0), "case": "another file's"}]
    (tmp_path / "ops-c.json").write_text(json.dumps({"schema": 1, "rows": other}))
    merge_ops(tmp_path)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert [(r["op"], r["p50_ms"]) for r in rows] == [
        ("b", 2.0), ("b", 2.0), ("a", 0.5), ("a", 2.0), ("a", 1.0),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["ops.json"]
    assert note(tmp_path, "block") == ""


def test_summary_of_the_tests(tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase name="test_{i}"><failure message="err {i}&#10;more"/></testcase>'
        for i in range(14)
    )
    counts = 'tests="29" failures="14" errors="0" skipped="2"'
    xml = f'<testsuites><testsuite {counts}>{cases}<testcase name="ok"/></testsuite></testsuites>'
    (tmp_path / "test-ops.xml").write_text(xml)
    lines = note(tmp_path, "test-ops").splitlines()
    assert lines[0] == "29 tests, 14 failures, 0 errors, 2 skipped"
    assert lines[1] == "    test_0: err 0" and lines[-1] == "    and 2 more"
