"""Which of the kernels on CUDA runs: Triton's, the ahead-of-time ones, or the reference.

There is no GPU here, so a stand-in has what the choice looks at.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sora_kernels import _ext, backend

OP = "norm_modulate"


def on_cuda(width: int = 1152, dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(
        is_cuda=True, is_cpu=False, dtype=dtype, shape=(4, width), device=torch.device("cuda", 0)
    )


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100 with Triton and with csrc/cuda built; nothing was decided before, nor is after."""
    monkeypatch.setattr(backend, "_INTERPRETING", False)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "_cuda_ops", dict.fromkeys(backend.cuda_ops(), True))
    monkeypatch.setattr(backend, "_measured", {OP: []})
    monkeypatch.setattr(backend, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(backend, "_settled", {})
    monkeypatch.setattr(backend, "_decisions", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_triton_is_the_default() -> None:
    assert backend.choose(OP, on_cuda()) == "triton"
    assert backend.choose(OP, on_cuda()) == "triton"  # the settled one
    assert backend.explain() == f"{OP} on cuda: triton"


def test_ahead_of_time_kernels_serve_where_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.choose(OP, on_cuda()) == "native"
    assert backend.choose(OP, on_cuda()) == "native"
    assert backend.explain() == f"{OP} on cuda: native (not triton: triton is not installed)"


def test_without_both_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    monkeypatch.setattr(backend, "_cuda_ops", dict.fromkeys(backend.cuda_ops(), False))
    monkeypatch.setitem(_ext.missing, "_C_cuda", "_C_cuda.so was not built")
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert backend.choose(OP, on_cuda()) == "reference"
    with pytest.raises(ValueError, match=r"use_backend\('native'\).*_C_cuda.so was not built"):
        with backend.use_backend("native"):
            backend.choose(OP, on_cuda())


def test_measurements_choose_per_width_dtype_and_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {
        "capability": [9, 0], "dtype": "bfloat16", "widths": [1, 1536], "backend": "native",
    }  # fmt: skip
    monkeypatch.setattr(backend, "_measured", {OP: [rule]})
    assert backend.choose(OP, on_cuda(1152)) == "native"
    assert backend.explain() == (
        f"{OP} on cuda: native (measured faster than triton at widths 1 to 1536)"
    )
    assert backend.choose(OP, on_cuda(3072)) == "triton"
    assert backend.choose(OP, on_cuda(1536)) == "native"
    assert backend.choose(OP, on_cuda(1152, torch.float16)) == "triton"
    monkeypatch.setattr(backend, "_capability", lambda index: (8, 0))
    assert backend.choose(OP, on_cuda(1152)) == "triton"


def test_rows_too_wide_for_triton_are_not_too_wide() -> None:
    assert backend.fall_back(OP, on_cuda(20000), "does not fit") == "native"
    assert backend.explain() == f"{OP} on cuda: native (does not fit)"


def test_forced_backends_are_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "native", "triton"):
        with backend.use_backend(name):
            assert backend.choose(OP, on_cuda()) == name
    with (
        backend.use_backend("native"),
        pytest.raises(ValueError, match="no ahead-of-time CUDA kernel for patchify"),
    ):
        backend.choose("patchify", on_cuda())


def test_native_on_cuda_is_another_raw_op() -> None:
    cpu = backend.implementation(OP, "fwd", "native", torch.empty(1))
    cuda = backend.implementation(OP, "fwd", "native", on_cuda())
    triton = backend.implementation(OP, "fwd", "triton", on_cuda())
    names = [call.args[0].name() for call in (cpu, cuda, triton)]  # type: ignore[attr-defined]
    plain = "sora_kernels::norm_modulate_fwd"
    assert names == [plain, f"{plain}_cuda", plain]


@pytest.mark.parametrize("op", backend.cuda_ops())
def test_raw_ops_have_a_shape_function_and_keep_gradients(op: str) -> None:
    usual = getattr(torch.ops.sora_kernels, op.removesuffix("_cuda")).default
    ahead = getattr(torch.ops.sora_kernels, op).default
    assert str(ahead._schema).replace("_cuda(", "(") == str(usual._schema)
    x = torch.empty(1, 4, 8, device="meta")
    if op == "norm_modulate_fwd_cuda":
        arguments = (x, *(None,) * 9, 4, 1e-6, False, 0, torch.float32)
        assert [t.shape for t in ahead(*arguments)] == [t.shape for t in usual(*arguments)]
        with pytest.raises(RuntimeError, match="has no gradient"):
            ahead(torch.empty(1, 4, 8, requires_grad=True), *arguments[1:])


def test_a_table_of_measurements_is_read_and_checked(tmp_path: Path) -> None:
    assert backend._read_measured(tmp_path) == []
    rule: dict[str, Any] = {
        "capability": [9, 0], "dtype": "float32", "widths": [8, 64], "backend": "native",
    }  # fmt: skip
    (tmp_path / "backend.json").write_text(json.dumps([rule]))
    assert backend._read_measured(tmp_path) == [rule]
    (tmp_path / "backend.json").write_text(json.dumps([rule | {"backend": "fastest"}]))
    with pytest.raises(ValueError, match="expected capability, dtype, widths, backend"):
        backend._read_measured(tmp_path)
