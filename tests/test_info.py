"""`python -m sora_kernels.info` says what is there, and one sentence for each thing that is not."""

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sora_kernels import _ext, info

OPS = {p.parent.name for p in Path(info.__file__).parent.glob("ops/*/__init__.py")}


def test_command_prints_json() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "sora_kernels.info", "--json"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["ops"]) == OPS
    assert not facts["interpreting"]
    for op in facts["ops"].values():
        for choice in op.values():
            assert choice["backend"] not in choice["why_not"]


def test_command_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert all(op in text for op in OPS)
    assert "interpreter" in text  # as these tests run with TRITON_INTERPRET=1


def test_unknown_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as raised:
        info.main(["--no-such-option"])
    assert raised.value.code == 2


def test_every_missing_thing_has_a_sentence() -> None:
    facts = info.collect()
    missing = " | ".join(facts["missing"])
    for part in facts["compiled"].values():
        assert part["loaded"] or part["why_not"] in missing
    assert facts["versions"]["triton"] or "triton" in missing
    assert facts["tools"]["nvcc"] or "nvcc" in missing
    assert torch.cuda.is_available() or "CUDA" in missing or "device" in missing


def test_a_library_that_did_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "cpu_loaded", False)
    monkeypatch.setitem(_ext.missing, "_C_cpu", "undefined symbol: example")
    facts = info.collect()
    assert not facts["compiled"]["_C_cpu"]["loaded"]
    assert "C++ CPU kernels: undefined symbol: example" in facts["missing"]
    assert "undefined symbol: example" in info.report(facts)


@pytest.mark.parametrize(
    "files, expected",
    [
        ([], "was not built"),
        (["_host.cpython-39-x86_64-linux-gnu.so"], "built for another Python: _host.cpython-39-"),
        (["_host.cp39-win_amd64.pyd"], "built for another Python: _host.cp39-win_amd64.pyd, "),
        (
            [f"_host{EXTENSION_SUFFIXES[0]}", "_host.cpython-39-x86_64-linux-gnu.so"],
            "the host module does not load: ",
        ),
    ],
)
def test_a_host_module_that_cannot_be_used_is_explained(
    files: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package's own import, of a folder with the files that a build elsewhere leaves."""
    for file in files:
        (tmp_path / file).write_bytes(b"not a library")
    monkeypatch.setitem(sys.modules, "sora_kernels", ModuleType("sora_kernels"))
    monkeypatch.delitem(sys.modules, "sora_kernels._host", raising=False)
    sys.modules["sora_kernels"].__path__ = [str(tmp_path)]
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # without an editable install's finder
    monkeypatch.setattr(_ext, "_HERE", tmp_path)
    monkeypatch.setattr(_ext, "missing", {})
    assert _ext._load_host() is None
    sentence = _ext.missing["_host"]
    assert expected in sentence and "\n" not in sentence
    monkeypatch.setattr(_ext, "host", None)
    assert f"host module: {sentence}" in info.collect()["missing"]


def test_absent_tools_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    facts = info.collect()
    assert facts["tools"] == {"c++": None, "nvcc": None, "ninja": None}
    assert any("C++ compiler" in sentence for sentence in facts["missing"])
    assert any("nvcc was not found" in sentence for sentence in facts["missing"])
