"""Which library runs a dense call: predicates with reasons, rules as data, and the adapters.

The libraries need a GPU; here their places are taken by functions that hold them to their own
signatures and compute the reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sora_kernels import backend
from sora_kernels.ops.packed_attention import libraries, packed_attention
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN, Arguments, Call, choose
from sora_kernels.ops.packed_attention.reference import packed_attention_reference
from tests.helpers import randn

H100 = Call(
    chip=(9, 0), dtype=torch.bfloat16, head_dim=128, heads=24, heads_k=24, max_seqlen=32768,
    equal=True, causal=False, training=False, return_lse=False, deterministic=True,
    compiling=False,
)  # fmt: skip


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_installed", lambda module: True)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sdpa_cudnn", {}, None),
        ("sdpa_cudnn", {"chip": None}, "needs an NVIDIA GPU"),
        ("sdpa_cudnn", {"dtype": torch.float32}, "bf16 or fp16"),
        ("sdpa_cudnn", {"equal": False}, "differ in length"),
        ("sdpa_cudnn", {"training": True}, "not deterministic"),
        ("sdpa_cudnn", {"training": True, "deterministic": False}, None),
        ("sdpa_flash", {"return_lse": True}, "no LSE"),
        ("torch_varlen", {"equal": False}, None),
        ("torch_varlen", {"heads_k": 8}, "grouped heads"),
        ("flash_attn_2", {"equal": False, "training": True}, None),
        ("flash_attn_2", {"head_dim": 72}, None),
        ("flash_attn_2", {"head_dim": 36}, "multiple of 8"),
        ("flash_attn_2", {"return_lse": True, "training": True}, "LSE has no gradient"),
        ("flash_attn_3", {"chip": (8, 9)}, "compute capability 9.0"),
        ("flash_attn_4", {"compiling": True}, "break the graph"),
        ("flash_attn_4", {"head_dim": 256}, "up to 128"),
    ],
)
def test_predicates_say_why(name: str, changes: dict[str, Any], reason: str | None) -> None:
    found = LIBRARIES[name].why_not(dataclasses.replace(H100, **changes))
    if reason is None:
        assert found is None
    else:
        assert found is not None and reason in found


def test_a_missing_package_is_a_reason() -> None:
    for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
        found = LIBRARIES[name].why_not(H100)
        assert found is not None and "is not installed" in found


@pytest.mark.usefixtures("everything_installed")
def test_the_first_rule_that_fits_decides() -> None:
    rules = (
        {"min_seqlen": 65536, "prefer": ["flash_attn_3"]},
        {"head_dim": 128, "training": True, "prefer": ["sdpa_cudnn", "flash_attn_4"]},
        {"head_dim": 128, "prefer": ["sdpa_cudnn"]},
    )
    assert choose(H100, rules) == ("sdpa_cudnn", {})
    assert choose(dataclasses.replace(H100, max_seqlen=100_000), rules)[0] == "flash_attn_3"
    name, refused = choose(dataclasses.replace(H100, training=True), rules)
    assert name == "flash_attn_4" and "not deterministic" in refused["sdpa_cudnn"]
    name, refused = choose(dataclasses.replace(H100, equal=False), rules)
    assert name == OWN and "differ in length" in refused["sdpa_cudnn"]
    assert choose(dataclasses.replace(H100, head_dim=64), rules) == (OWN, {})


def test_without_measurements_our_kernel_runs() -> None:
    assert libraries.rules_of((12, 3)) == ()
    assert choose(H100, ()) == (OWN, {})


def arguments(
    lengths: list[int], *, heads_k: int = 2, causal: bool = False, return_lse: bool = False
) -> tuple[Arguments, tuple[Tensor, Tensor]]:
    n = sum(lengths)
    q, k, v = randn(n, 2, 8), randn(n, heads_k, 8, seed=1), randn(n, heads_k, 8, seed=2)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    a = Arguments(q, k, v, cu, cu, max(lengths), max(lengths), 0.3, causal, return_lse, True)
    return a, packed_attention_reference(q, k, v, lengths, lengths, 0.3, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [1, 2])
def test_sdpa_adapter(causal: bool, heads_k: int) -> None:
    a, (out, _) = arguments([6, 6, 6], heads_k=heads_k, causal=causal)
    torch.testing.assert_close(libraries._sdpa(SDPBackend.MATH, a), out)


def reference_of(cu_q: Tensor, cu_k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lengths = [x.diff().tolist() for x in (cu_q, cu_k)]
    return packed_attention_reference(*args[:3], *lengths, *args[3:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_varlen_adapter(monkeypatch: pytest.MonkeyPatch, causal: bool, old: bool) -> None:
    """Of this torch, and of those whose function had `is_causal` and no `scale`."""

    def new_function(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor,
                     cu_seq_k: Tensor, max_q: int, max_k: int, *, scale: float,
                     window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
        assert window_size == ((-1, 0) if causal else (-1, -1))
        return reference_of(cu_seq_q, cu_seq_k, query, key, value, scale, causal)[0]

    def old_function(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor,
                     cu_seq_k: Tensor, max_q: int, max_k: int,
                     is_causal: bool = False) -> Tensor:  # fmt: skip
        scale = query.shape[-1] ** -0.5
        return reference_of(cu_seq_q, cu_seq_k, query, key, value, scale, is_causal)[0]

    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", old_function if old else new_function)
    a, (out, _) = arguments([6, 0, 3], causal=causal)
    torch.testing.assert_close(LIBRARIES["torch_varlen"].run(a), out)


@pytest.mark.parametrize(
    ("name", "path", "lse_name"),
    [
        ("flash_attn_2", "flash_attn.flash_attn_interface", "return_attn_probs"),
        ("flash_attn_3", "flash_attn_interface", "return_attn_probs"),
        ("flash_attn_4", "flash_attn.cute", "return_lse"),
    ],
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_flash_adapters(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str, lse_name: str, return_lse: bool
) -> None:
    def compute(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float,
                causal: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = reference_of(cu_q, cu_k, q, k, v, scale, causal)
        return out, lse.masked_fill(lse == float("-inf"), float("inf"))

    def two(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
            causal=False, deterministic=False, return_attn_probs=False):  # type: ignore[no-untyped-def] # fmt: skip
        assert deterministic
        found = compute(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return (*found, None) if return_attn_probs else found[0]

    def four(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
             softmax_scale=None, causal=False, deterministic=False, return_lse=False):  # type: ignore[no-untyped-def] # fmt: skip
        assert deterministic
        found = compute(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return found if return_lse else (found[0], None)

    module = types.ModuleType(path)
    module.flash_attn_varlen_func = four if lse_name == "return_lse" else two  # type: ignore[attr-defined]
    if "." in path:
        monkeypatch.setitem(sys.modules, path.split(".")[0], types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, path, module)
    a, (out, lse) = arguments([5, 0, 4], return_lse=return_lse)
    result = LIBRARIES[name].run(a)
    if return_lse:
        torch.testing.assert_close(result[1], lse)
        result = result[0]
    torch.testing.assert_close(result, out)


def test_asking_for_a_library_that_cannot_run_is_an_error() -> None:
    q, k, v = randn(6, 3, 2, 8).unbind(1)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="library: sdpa_cudnn cannot run this call: it needs an"):
        packed_attention(q, k, v, cu_seqlens=cu, library="sdpa_cudnn")
    with pytest.raises(ValueError, match="library: expected one of .*, got 'cutlass'"):
        packed_attention(q, k, v, cu_seqlens=cu, library="cutlass")


def test_the_measured_choice_is_taken_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose table prefers a library; the library is a stand-in."""
    calls: list[Arguments] = []

    def run(a: Arguments) -> Tensor:
        calls.append(a)
        return a.q * 2

    monkeypatch.setitem(LIBRARIES, "flash_attn_4", libraries.Library(lambda call: None, run))
    monkeypatch.setattr(libraries, "rules_of", lambda chip: ({"prefer": ["flash_attn_4"]},))
    monkeypatch.setattr(libraries, "chip_of", lambda q: (9, 0))
    a, _ = arguments([2, 4])
    ran, out = libraries.run_by_library(a, None, training=False)
    assert ran and torch.equal(out, a.q * 2) and len(calls) == 1
    assert "packed_attention on cpu: flash_attn_4" in backend.explain()
    assert libraries.run_by_library(a, OWN, training=False) == (False, None)
    with backend.use_backend("reference"):  # a forced implementation is ours
        assert libraries.run_by_library(a, None, training=False) == (False, None)
