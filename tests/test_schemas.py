"""Schemas of raw ops have one source, the Python side; the compiled libraries bring the same."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sora_kernels import _ext, backend, info

ROOT = Path(__file__).parents[1]


def test_header_is_what_the_ops_register() -> None:
    spec = importlib.util.spec_from_file_location("schemas", ROOT / "csrc" / "schemas.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for op in info.op_names():
        importlib.import_module(f"sora_kernels.ops.{op}")
    text = (ROOT / "csrc" / "common" / "schemas.h").read_text()
    assert text == script.header(backend.native_schemas()), "run python csrc/schemas.py"


def test_the_library_alone_defines_what_it_implements() -> None:
    """In a process that never imports sora_kernels, with the very schemas of this one."""
    names = [f"{op}_{way}" for op in backend.native_schemas() for way in ("fwd", "bwd")]
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1])\n"
        "for name in sys.argv[2:]: print(getattr(torch.ops.sora_kernels, name).default._schema)\n"
        "assert 'sora_kernels' not in sys.modules"
    )
    library = Path(_ext.__file__).with_name("_C_cpu.so")
    result = subprocess.run(
        [sys.executable, "-c", code, str(library), *names], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    here = [str(getattr(torch.ops.sora_kernels, name).default._schema) for name in names]
    assert result.stdout.splitlines() == here and len(here) >= 18


def test_a_library_of_other_sources_is_refused() -> None:
    with pytest.raises(ImportError, match=r"built from other sources \(it has .*bias_gelu_fwd\(Te"):
        backend.define("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor")
    backend.define("bias_gelu_fwd(Tensor x, Tensor? bias) -> Tensor")  # its own is no surprise
