"""The workflows, as far as they can be checked where none ever runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
JOBS = dict(re.findall(r"^  ([\w-]+):\n((?:    .*\n|\n)+)", WORKFLOW.partition("jobs:")[2], re.M))


def commands() -> list[str]:
    blocks = re.findall(r"run: (?:\|\n((?: {10}.*\n)+)|(.+)\n)", WORKFLOW)
    return [line.strip() for pair in blocks for line in (pair[0] or pair[1]).splitlines()]


def test_it_parses_where_a_parser_is_installed() -> None:
    assert set(JOBS) == {"lint", "test", "cross-compile", "wheel", "gate"}
    if importlib.util.find_spec("yaml"):  # which comes with what Python 3.11 and newer install
        import yaml

        found = yaml.safe_load(WORKFLOW)
        assert found["permissions"] == {"contents": "read"}
        assert set(found["jobs"]) == set(JOBS)
        steps = [step for job in found["jobs"].values() for step in job["steps"]]
        assert all(("run" in step) != ("uses" in step) for step in steps)
        assert sum("run" in step for step in steps) == len(re.findall(r"\brun: ", WORKFLOW))


def test_actions_are_pinned_jobs_end_and_nothing_is_expanded_into_a_shell() -> None:
    used = re.findall(r"uses: (.*)", WORKFLOW)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u) for u in used)
    versions: dict[str, str] = {}
    for action, pin in (u.split("@") for u in used):
        assert versions.setdefault(action, pin) == pin
    for name, job in JOBS.items():
        assert re.search(r"^    timeout-minutes: [1-6]\d$", job, re.M), name
    assert commands() and not any("${{" in command for command in commands())


def test_a_fork_gets_no_secret_and_its_older_runs_are_cancelled() -> None:
    assert "pull_request_target" not in WORKFLOW and "secrets." not in WORKFLOW
    assert re.search(r"^permissions:\n  contents: read\n", WORKFLOW, re.M)
    assert "write" not in WORKFLOW
    assert "cancel-in-progress: ${{ github.event_name == 'pull_request' }}" in WORKFLOW


def test_the_oldest_python_of_the_package_is_tested() -> None:
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and f'python: ["{oldest[1]}",' in WORKFLOW


def test_what_the_steps_name_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert words[-1] in targets, command
        scripts = [w for w in words if w.endswith(".py") or w.startswith(".ci/")]
        assert all((ROOT / script).is_file() for script in scripts), command
        if "-m" in words:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), command
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
