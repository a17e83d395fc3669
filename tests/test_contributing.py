"""CONTRIBUTING.md: every file, target, command and link in it exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]
COMMANDS += re.findall(r"`((?:python|make) [^`]+)`", TEXT)


def words(command: str) -> list[str]:
    """Without the environment in front."""
    found = shlex.split(command)
    while re.match(r"[A-Z_]+=", found[0]):
        found.pop(0)
    return found


def test_files_exist() -> None:
    files = re.findall(r"`([\w./]+\.(?:py|md|cpp|sh))`", TEXT)
    assert len(files) > 10
    bare = {"kernels_bwd.py", "setup.py"}  # of the op's folder, of the root
    assert not [f for f in files if not (ROOT / f).is_file() and f not in bare]


def test_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        program, *rest = words(command)
        if program == "make":
            assert rest[0] in targets, command
        elif program.endswith("python"):
            assert importlib.util.find_spec(rest[rest.index("-m") + 1]), command
        else:
            assert (ROOT / program).is_file(), command
        for path in (word for word in rest if word.startswith("tests/")):
            assert (ROOT / path).exists(), command


def test_options_of_the_lane_exist() -> None:
    lane = (ROOT / "benchmarks" / "gpu_lane.py").read_text()
    options = [w for c in COMMANDS for w in words(c) if "gpu_lane" in c and w.startswith("--")]
    assert set(options) == {"--list", "--out", "--archive"}
    assert all(f'"{option}"' in lane for option in options)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", TEXT)
    assert links
    for target, anchor in links:
        headings = re.findall(r"^#+ (.*)", (ROOT / target).read_text(), re.M)
        assert not anchor or anchor in [h.lower().replace(" ", "-") for h in headings], target
