"""What the GPU tests do when one of them kills the CUDA context of its process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import conftest

def test_kills_the_context():
    conftest.context_is_dead = lambda: True
    raise RuntimeError("an illegal memory access was encountered")
""" + "".join(f"\n\ndef test_{i}():\n    pass\n" for i in range(6))


@pytest.mark.parametrize(
    ("processes", "passed"), [((), 0), (("-p", "xdist", "-n", "1", "--max-worker-restart=9"), 6)]
)
def test_only_the_culprit_fails(tmp_path: Path, processes: tuple[str, ...], passed: int) -> None:
    shutil.copy(Path(__file__).parent / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = bool\n")  # loads at once
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *processes]
    env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "an illegal memory access" in done.stdout
    found = dict(map(reversed, re.findall(r"(\d+) (passed|failed)", done.stdout)))
    assert int(found.get("passed", 0)) == passed, done.stdout
    culprits = set(re.findall(r"^FAILED \S+::(\S+)|while running '\S+::(\w+)'", done.stdout, re.M))
    assert {name for pair in culprits for name in pair if name} == {"test_kills_the_context"}
    assert passed or "left a dead CUDA context" in done.stdout + done.stderr
