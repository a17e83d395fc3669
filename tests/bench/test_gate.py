"""The gate: in which order it runs, what fails it, and the documented use by another project."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from itertools import groupby
from pathlib import Path

import pytest

import benchmarks.gate
from sora_kernels.bench.gate import Failed, main, ratios, rounds_for, run_both, slowdown, slower
from sora_kernels.bench.turns import REFEREE, referee, turn

ROOT = Path(__file__).parents[2]
PYTHON = shlex.quote(sys.executable) + " -I -S"  # starts in no time


def checkout(folder: Path, milliseconds: float) -> Path:
    """A project whose script says how fast it is, a little differently every time."""
    folder.mkdir()
    (folder / "log").touch()
    (folder / "timed.py").write_text(
        "import json, pathlib\n"
        "log = pathlib.Path('log'); log.write_text(log.read_text() + 'x')\n"
        f"jitter = 1 + 0.01 * (len(log.read_text()) % 3)\n"
        f"print('hello'); print(json.dumps({{'block': {milliseconds} * jitter}}))\n"
    )
    return folder


@pytest.mark.parametrize(("head_ms", "code"), [(10.3, 0), (12.0, 1)])
def test_fails_only_beyond_doubt(
    tmp_path: Path, head_ms: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    base, head = checkout(tmp_path / "base", 10.0), checkout(tmp_path / "head", head_ms)
    arguments = ["--base", str(base), "--head", str(head), "--run", f"{PYTHON} timed.py",
                 "--rounds", "6", "--json", str(tmp_path / "gate.json")]  # fmt: skip
    assert main(arguments) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)
    written = json.loads((tmp_path / "gate.json").read_text())
    assert len(written["pairs"]) == 6 and written["ratios"]["block"]["rounds"] == 6
    assert (base / "log").read_text() == (head / "log").read_text() == "x" * 6


def test_more_names_take_more_rounds_and_wider_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty names of a noisy machine: together they fail equal checkouts no more than one does."""
    assert [rounds_for(names) for names in (1, 2, 20)] == [6, 7, 10]
    assert rounds_for(1, outliers=1) == 9
    lucky = [({"a": [1.0]}, {"a": [1.2]})] * 9 + [({"a": [1.0]}, {"a": [0.9]})]
    many = [[dict.fromkeys("abcdefghijklmnopqrst", x["a"]) for x in pair] for pair in lucky]
    assert slower(ratios(lucky), 5.0) == ["a"]
    assert not slower(ratios([(base, head) for base, head in many]), 5.0)
    script = 'print(\'{"a": 1, "b": 1}\')'
    for name in ("base", "head"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "timed.py").write_text(script)
    (tmp_path / "head" / "timed.py").write_text(script.replace("b", "c"))
    folders = ["--base", str(tmp_path / "base"), "--head", str(tmp_path / "head")]
    assert main([*folders, "--run", f"{PYTHON} timed.py"]) == 0
    found = capsys.readouterr()
    assert "round 9 of 9" in found.err and "not compared: b, c" in found.out
    (tmp_path / "head" / "timed.py").write_text(script)
    assert main([*folders, "--run", f"{PYTHON} timed.py", "--rounds", "6"]) == 2
    assert "rounds: expected at least 7 for intervals of 2 names" in capsys.readouterr().err


def test_a_wide_interval_does_not_fail() -> None:
    noisy = [({"a": [1.0]}, {"a": [ratio]}) for ratio in (0.9, 1.0, 1.2, 1.3, 1.4, 1.5)]
    assert not slower(ratios(noisy), 5.0)
    assert slower(ratios([({"a": [1.0]}, {"a": [1.2]})] * 6), 5.0) == ["a"]


def test_a_round_is_the_median_of_neighbouring_calls() -> None:
    """A machine that is half as fast from the second call on slows both."""
    base, head = [1.0, 2.0, 2.0, 2.0, 2.0], [1.1, 2.2, 9.0, 2.2, 2.2]
    assert slowdown(base, head) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nowhere", "--head", "."], "base: expected a folder, got nowhere"),
        (["--base", ".", "--head", "."], "head: expected another folder than base"),
        (["--base", ".", "--head", "tests", "--rounds", "3"], "rounds: expected at least 6"),
        (["--base", ".", "--head", "tests", "--run", ""], "command: expected a program"),
        (["--base", ".", "--head", "tests", "--fail-over", "-1"], "--fail-over: expected 0 or"),
        (["--base", ".", "--head", "tests", "--run", f"{PYTHON} -c 1"], "as the last line"),
        (["--base", ".", "--head", "tests", "--run", f"{PYTHON} -c 1/0"], "ZeroDivisionError"),
    ],
)
def test_bad_input_is_one_line_and_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert benchmarks.gate.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_our_own_ops_are_what_is_timed_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--base", ".", "--head", "tests"])
    assert "--run" in capsys.readouterr().err
    ran: list[object] = []

    def interleaved(base: Path, head: Path, command: object, *rest: object) -> list:
        ran.append(command)
        return [({"op": [1.0]}, {"op": [1.0]})] * 6

    monkeypatch.setattr("sora_kernels.bench.gate.interleave", interleaved)
    assert benchmarks.gate.main(["--base", str(ROOT), "--head", str(tmp_path)]) == 0
    assert ran == [[sys.executable, "-m", "benchmarks.gate_cases"]]


def play(number: int, turns: int, log: list[int], together: threading.Barrier) -> None:
    """One player, with `turn` as a process has it."""
    together.wait()
    with socket.socket(fileno=number) as mine:
        for _ in range(turns):
            mine.sendall(b"?")
            mine.recv(1)
            log += [number, number]  # torn apart if two had their turn at once
            mine.sendall(b".")


def test_turns_alternate_and_go_on_when_one_has_ended() -> None:
    ends = [socket.socketpair() for _ in range(2)]
    log: list[int] = []
    together = threading.Barrier(2)
    numbers = [theirs.detach() for _, theirs in ends]
    threads = [
        threading.Thread(target=play, args=(number, turns, log, together))
        for number, turns in zip(numbers, (3, 5), strict=True)
    ]
    for thread in threads:
        thread.start()
    assert referee([mine for mine, _ in ends], first=1) == [3, 5]
    for thread in threads:
        thread.join()
    order = [number for number, _ in groupby(log)]
    assert order == [numbers[1], numbers[0]] * 3 + [numbers[1]] and len(log) == 16


TURNS = """
import importlib.util, json, os, pathlib, sys
path = pathlib.Path({turns!r})
spec = importlib.util.spec_from_file_location("turns", path)
turns = importlib.util.module_from_spec(spec); spec.loader.exec_module(turns)
for _ in range(4):
    with turns.turn():
        with open("../log", "a") as log: log.write(os.path.basename(os.getcwd()) + " ")
print(json.dumps(dict(a=1.0)))
"""


def test_both_checkouts_run_at_once_and_measure_in_turn(tmp_path: Path) -> None:
    folders = [tmp_path / "base", tmp_path / "head"]
    for folder in folders:
        folder.mkdir()
        script = TURNS.format(turns=str(ROOT / "sora_kernels" / "bench" / "turns.py"))
        (folder / "timed.py").write_text(script)
    command = shlex.split(f"{PYTHON} timed.py")
    assert run_both(folders, command, 30) == [{"a": [1.0]}] * 2
    assert run_both(folders[::-1], command, 30) == [{"a": [1.0]}] * 2
    assert (tmp_path / "log").read_text().split() == ["base", "head"] * 4 + ["head", "base"] * 4
    (folders[1] / "timed.py").write_text("1/0")
    with pytest.raises(Failed, match="head: exit code 1: ZeroDivisionError"):
        run_both(folders, command, 30)
    for folder in folders:
        (folder / "timed.py").write_text("print('{\"a\": 1}')")
    with pytest.raises(Failed, match="--turns: expected a script that times by"):
        run_both(folders, command, 30)
    (folders[0] / "timed.py").write_text("import time; time.sleep(60)")
    with pytest.raises(Failed, match="nothing for 1 s"):
        run_both(folders, command, 1)


def test_measure_takes_a_turn_for_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from sora_kernels.bench import measure

    mine, theirs = socket.socketpair()
    asked = []
    monkeypatch.setenv(REFEREE, str(theirs.detach()))

    def grant() -> None:
        for _ in range(7):
            asked.append(mine.recv(1))
            mine.sendall(b"!")
            asked.append(mine.recv(1))

    thread = threading.Thread(target=grant)
    thread.start()
    measure({"a": lambda: None}, seconds=0.001, min_rounds=7, max_rounds=7)
    thread.join()
    assert asked == [b"?", b"."] * 7
    monkeypatch.delenv(REFEREE)
    with turn():  # nobody to ask
        pass
    mine.close()


def test_every_op_has_a_case_in_the_gate() -> None:
    from benchmarks.gate_cases import cases

    ops = {path.parent.name for path in (ROOT / "sora_kernels" / "ops").glob("*/reference.py")}
    assert set(cases("cpu")) == ops


def test_our_own_cases_print_a_time_for_each_op_and_shape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gate_cases

    monkeypatch.setattr(gate_cases, "SWEEPS", 1)
    assert gate_cases.main(["patchify/*"]) == 0
    times = json.loads(capsys.readouterr().out)
    assert list(times) == ["patchify/fwd/16x4x16x32", "patchify/bwd/16x4x16x32"]
    assert all(len(ms) == gate_cases.ROUNDS for ms in times.values())


def test_the_ten_lines_of_the_documentation_gate_another_project(tmp_path: Path) -> None:
    """docs/ci.md gives a script that times a block; it runs here as it stands there."""
    text = (ROOT / "docs" / "ci.md").read_text()
    script = re.search(r"```python\n# bench_block\.py\n(.*?)```", text, re.DOTALL)
    assert script is not None
    assert len([line for line in script[1].splitlines() if line.strip()]) <= 10
    block = "import torch\ndef my_block(x):\n    return torch.nn.functional.layer_norm(x, (64,))\n"
    for name in ("base", "head"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my_project.py").write_text(block)
        (tmp_path / name / "bench_block.py").write_text(script[1])
    done = subprocess.run(
        [sys.executable, "bench_block.py"], cwd=tmp_path / "base", capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path / 'base'}:{ROOT}", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["block"]


def test_the_documented_step_is_a_command_that_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step of the workflow in docs/ci.md, in two checkouts whose scripts need no torch."""
    text = (ROOT / "docs" / "ci.md").read_text()
    step = re.search(r"- run: python -m sora_kernels\.bench\.gate (.*)", text)
    assert step is not None
    for name, ms in (("base", 1.0), ("head", 1.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench_block.py").write_text(f"print('{{\"block\": {ms}}}')")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(step[1].replace('"python ', f'"{PYTHON} '))
    assert "--turns" in arguments
    assert main([*arguments, "--no-turns", "--rounds", "6"]) == 1
    assert "1 of 1 slower by over 5%" in capsys.readouterr().out
