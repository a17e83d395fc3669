"""`--strict-skips` lets a test run fail when tests vanish by skipping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(("reason", "code"), [("a part is missing", 1), ("nvcc is not on PATH", 0)])
def test_only_expected_reasons_may_skip(tmp_path: Path, reason: str, code: int) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n\ndef test_skipped():\n    pytest.skip({reason!r})\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-skips", "-p", "no:cacheprovider", "."],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": str(CONFTEST.parents[1])},
    )  # fmt: skip
    assert run.returncode == code, run.stdout + run.stderr
    assert ("1 skipped without an expected reason: a part is missing" in run.stdout) == bool(code)
