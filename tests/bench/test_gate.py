"""The gate: in which order it runs, what fails it, and the documented use by another project."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.gate
from sora_kernels.bench.gate import main, ratios, slower

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


def test_a_wide_interval_does_not_fail() -> None:
    noisy = [({"a": 1.0}, {"a": ratio}) for ratio in (0.9, 1.0, 1.2, 1.3, 1.4, 1.5)]
    assert not slower(ratios(noisy), 5.0)
    assert slower(ratios([({"a": 1.0}, {"a": 1.2})] * 6), 5.0) == ["a"]


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
        return [({"op": 1.0}, {"op": 1.0})] * 6

    monkeypatch.setattr("sora_kernels.bench.gate.interleave", interleaved)
    assert benchmarks.gate.main(["--base", str(ROOT), "--head", str(tmp_path)]) == 0
    assert ran == [[sys.executable, "-m", "benchmarks.gate_cases"]]


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
    assert main([*arguments, "--rounds", "6"]) == 1
    assert "1 of 1 slower by over 5%" in capsys.readouterr().out
