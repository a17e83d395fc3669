"""What setup.py asks of nvcc, and that a part that cannot be built leaves the others."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from setuptools import Distribution

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(SETUP))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def code(number: str, kind: str = "sm") -> str:
    return f"-gencode=arch=compute_{number},code={kind}_{number}"


@pytest.mark.parametrize("wish", [None, "", " ; "])
def test_an_older_nvcc_is_asked_for_what_it_knows(
    setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str | None
) -> None:
    nvcc = script(tmp_path / "nvcc", "echo compute_80; echo compute_89; echo compute_90")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup["gencode"](nvcc).split() == [code("80"), code("80", "compute"), code("90")]


def test_chips_that_were_asked_for_are_not_dropped(
    setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX 10.0")
    expected = [code("86"), code("90a"), code("90a", "compute"), code("100")]
    assert setup["gencode"](tmp_path / "no nvcc").split() == expected


def test_a_part_that_fails_leaves_the_others(
    setup: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = script(
        tmp_path / "good", 'for last; do :; done; echo > "$last"; echo "$last:" > "$last.d"'
    )
    bad = script(tmp_path / "bad", "exit 1")
    source = tmp_path / "source.cpp"
    source.touch()
    ninja = setup["Ninja"](tmp_path / "ninja")
    targets = {}
    for compiler in (bad, good):
        targets[compiler.name] = tmp_path / f"{compiler.name}.so"
        made = ninja.compile(source, "", str(compiler), f"_{compiler.name}")
        ninja.link([made], targets[compiler.name], "", str(compiler))
    command = setup["BuildExt"](Distribution())
    built = {name: command.builds(ninja, name, target) for name, target in targets.items()}
    assert built == {"bad": False, "good": True}
    assert targets["good"].exists() and not targets["bad"].exists()
    assert "sora_kernels: bad failed to build and is left out" in capfd.readouterr().out
