"""packed_attention: random lengths against the oracle, libraries inside compiled code, and bad
input in fake and compiled calls."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from sora_kernels import PackedLayout, Text, packed_attention
from sora_kernels.ops.packed_attention import libraries
from sora_kernels.ops.packed_attention.libraries import LIBRARIES
from sora_kernels.ops.packed_attention.reference import packed_attention_reference
from tests.helpers import check, randn
from tests.ops.test_packed_attention import Q, cu, oracle, pack, run

# Mostly empty segments and single tokens, which is where the edges are.
LENGTHS = st.sampled_from([0, 0, 1, 1, 2, 3, 9, 17])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=7), st.booleans(), st.booleans(),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
)  # fmt: skip
def test_random_lengths(
    pairs: list[tuple[int, int]], cross: bool, causal: bool, heads: tuple[int, int]
) -> None:
    """Forward and backward; cross-attention has lengths of its own for the keys."""
    lengths = [a for a, _ in pairs]
    lengths_k = [b for _, b in pairs] if cross else lengths
    n, m = sum(lengths), sum(lengths_k)
    given_qkv = [randn(n, heads[0], 8), *(randn(m, heads[1], 8, seed=s) for s in (1, 2))]
    dout, dlse = randn(n, heads[0], 8, seed=3).double(), randn(heads[0], n, seed=4)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys = {"cu_seqlens_k": cu(lengths_k)} if cross else {}
        return packed_attention(
            q, k, v, cu_seqlens=cu(lengths), causal=causal, return_lse=True, **keys
        )

    def low(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return packed_attention_reference(q, k, v, lengths, lengths_k, 8**-0.5, causal)

    got = run(ours, given_qkv, torch.float32, dout, dlse)
    exact = run(
        lambda q, k, v: oracle(q, k, v, lengths, lengths_k, causal),
        given_qkv, torch.float64, dout, dlse.double(),
    )  # fmt: skip
    lowp = run(low, given_qkv, torch.float32, dout, dlse)
    blind = torch.isinf(exact[1])
    assert torch.equal(torch.isinf(got[1]), blind)
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        # The softmax of one key is 1 whatever its score: the reference errs by nothing there.
        results = [r[i].masked_fill(blind, 0.0) if i == 1 else r[i] for r in (got, exact, lowp)]
        check(*results, grad=i > 1, extra_ulp=16.0, name=name)


# --- libraries in compiled code -----------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper with every library installed; each computes the reference here."""
    import torch.nn.attention.varlen as varlen

    def by_lengths(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, scale: float) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens=cu_q, softmax_scale=scale)

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
                    max_q: int, max_k: int, *, scale: float) -> Tensor:  # fmt: skip
        return by_lengths(query, key, value, cu_seq_q, scale)

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return by_lengths(q, k, v, cu_seqlens_q, softmax_scale)

    monkeypatch.setattr(libraries, "chip_of", lambda q: (9, 0))
    monkeypatch.setattr(libraries, "_installed", lambda module: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    for name in ("flash_attn.flash_attn_interface", "flash_attn_interface"):
        module = types.ModuleType(name)
        vars(module)["flash_attn_varlen_func"] = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, name, module)
    math = LIBRARIES["sdpa_flash"]._replace(run=lambda a: libraries._sdpa(SDPBackend.MATH, a))
    monkeypatch.setitem(LIBRARIES, "sdpa_flash", math)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["sdpa_flash", "torch_varlen", "flash_attn_2", "flash_attn_3"])
def test_a_library_does_not_break_the_graph(name: str) -> None:
    """Two packs, one graph, whoever runs the call."""
    frames = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return 2 * packed_attention(q, k, v, layout, library=name, deterministic=False)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for length in (6, 9, 14, 30):
        layout = PackedLayout([[Text(length)]] * 3)
        q, k, v = randn(3 * length, 3, 2, 8, dtype=torch.bfloat16).unbind(1)
        assert torch.equal(compiled(q, k, v, layout), attend(q, k, v, layout))
    assert frames <= 3


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["eager", "fake", "compiled"])
@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "cu_seqlens: expected to rise from 0 to 6", {"cu_seqlens": cu([3, 4])}),
        (ValueError, "cu_seqlens: expected int32", {"cu_seqlens": cu([6]).float()}),
        (ValueError, "cu_seqlens: expected shape", {"cu_seqlens": cu([6])[None]}),
        (ValueError, "cu_seqlens: expected the device", {"cu_seqlens": cu([6]).to("meta")}),
        (ValueError, "got neither", {"cu_seqlens": None}),
        (ValueError, "layout: expected 6 tokens", {"layout": pack(5), "cu_seqlens": None}),
        (ValueError, "layout: expected the dev", {"layout": pack(6, "meta"), "cu_seqlens": None}),
        (ValueError, "cu_seqlens_k: expected 1 segments", {"cu_seqlens_k": cu([3, 3])}),
        (ValueError, "cu_seqlens_k: expected one", {"k": Q[:4], "v": Q[:4]}),
        (TypeError, "max_seqlen: expected an int", {"max_seqlen": 6.0}),
        (TypeError, "max_seqlen_k: expected an int",
         {"cu_seqlens_k": cu([6]), "max_seqlen_k": torch.tensor(6)}),
        (ValueError, "max_seqlen: expected at least 0, got -1", {"max_seqlen": -1}),
        (ValueError, "head dim of 1 to 256", {name: torch.zeros(6, 2, 257) for name in "qkv"}),
        (ValueError, "divides q's 2", {name: torch.zeros(6, 3, 16) for name in "kv"}),
        (ValueError, "q: expected stride 1", {"q": torch.zeros(6, 16, 2).mT}),
        (ValueError, "softmax_scale", {"softmax_scale": -1.0}),
        (ValueError, "library: expected one of", {"library": "cutlass"}),
        (ValueError, "library: sdpa_cudnn cannot run this call: it needs an NVIDIA",
         {"library": "sdpa_cudnn"}),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_every_path(
    path: str, error: type[Exception], match: str, kwargs: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": Q, "v": Q, "cu_seqlens": cu([6]), **kwargs}
    call: Any = packed_attention
    if path == "fake":
        if "expected to rise" in match:
            return  # a fake tensor has no values to check
        for name, value in arguments.items():
            if isinstance(value, (Tensor, PackedLayout)) and name != "max_seqlen_k":
                # What was on another device than q still is.
                target = "cpu" if value.device.type == "meta" else "meta"
                if isinstance(value, Tensor):
                    arguments[name] = torch.empty_like(value, device=target)
                else:
                    arguments[name] = value.to(target)
    if path == "compiled":
        torch._dynamo.reset()
        call = torch.compile(packed_attention, backend="eager")
    with pytest.raises(error, match=match):
        call(**arguments)
