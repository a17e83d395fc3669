"""The wheel that is built once: its tag, what it holds, and that every op of it runs."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from .one_binary import PLATFORM, Failed, build, load, main, problems


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


def test_one_wheel_for_every_python_with_the_libraries_in_it(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-{PLATFORM}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sora_kernels/_C_cpu.so" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sora_kernels"}
    assert all(name.endswith((".py", ".so", ".json", "py.typed")) or ".dist-info/" in name
               for name in names)  # fmt: skip
    metadata = next(name for name in names if name.endswith("/WHEEL"))
    assert f"Tag: py3-none-{PLATFORM}" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_installed_elsewhere_every_op_runs_the_compiled_kernels(wheel: Path) -> None:
    found = load(wheel, sys.executable)
    assert problems(found) == []
    assert found["loaded"]["_C_cpu"] and len(found["backends"]) > 10


def test_a_wheel_without_its_library_is_found_out(wheel: Path, tmp_path: Path) -> None:
    found = {"backends": {"norm_modulate": "reference"}, "loaded": {"_C_cpu": False}, "calls": 1}
    assert len(problems(found)) == 3
    shutil.copy(wheel, tmp_path / wheel.name)
    assert main(["--load", str(tmp_path), "--python", "/no/such/python"]) == 2
    with pytest.raises(Failed, match="exit|No|not"):
        load(tmp_path / "sora_kernels-9-py3-none-any.whl", sys.executable)
