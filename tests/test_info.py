"""`python -m sora_kernels.info` says what is there, and one sentence for each thing that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_absent_tools_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    facts = info.collect()
    assert facts["tools"] == {"c++": None, "nvcc": None, "ninja": None}
    assert any("C++ compiler" in sentence for sentence in facts["missing"])
    assert any("nvcc was not found" in sentence for sentence in facts["missing"])
