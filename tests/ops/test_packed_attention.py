"""packed_attention: every backend against an fp64 oracle built from explicit masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels import backend
from sora_kernels.ops.packed_attention import merge, packed_attention
from sora_kernels.ops.packed_attention.config import choose_config, split_head_dim
from sora_kernels.ops.packed_attention.reference import packed_attention_reference
from sora_kernels.ops.packed_attention.work import work_list
from sora_kernels.packing import Grid, PackedLayout, Text
from tests.helpers import check, poisoned, randn

# Lengths of queries and keys per segment; heads, key heads, head dim; causal.
SELF = [33, 0, 1, 6]
CROSS = ([40, 5, 0, 9, 3], [17, 33, 4, 0, 9])
CASES = {
    "self-hd64": (SELF, SELF, 2, 2, 64, False),
    "causal-hd32": ([65, 2, 0], [65, 2, 0], 1, 1, 32, True),
    "gqa-hd72": ([18, 0, 1], [18, 0, 1], 4, 2, 72, False),
    "cross-hd96": (*CROSS, 1, 1, 96, False),
    "mqa-causal-cross-hd24": (*CROSS, 2, 1, 24, True),
    "one-token-hd128": ([1], [1], 1, 1, 128, False),
    "hd5": ([3, 31], [32, 2], 1, 1, 5, False),
    "long-hd64": ([150, 9], [150, 9], 2, 1, 64, True),  # beyond what the CPU backward widens
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], lengths_k: list[int], causal: bool
) -> tuple[Tensor, Tensor]:
    """fp64 attention over the whole pack under one explicit mask."""
    group = q.shape[1] // k.shape[1]
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    segment_k = torch.arange(len(lengths_k)).repeat_interleave(torch.tensor(lengths_k))
    seen = segment[:, None] == segment_k[None, :]
    if causal:  # place from the end of the segment: bottom-right alignment
        end, end_k = cu(lengths)[1:][segment], cu(lengths_k)[1:][segment_k]
        left = end - torch.arange(len(segment))
        left_k = end_k - torch.arange(len(segment_k))
        seen &= left_k[None, :] >= left[:, None]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    blind = ~seen.any(1)
    p = torch.softmax(scores.masked_fill(blind[:, None], 0.0), -1).masked_fill(blind[:, None], 0.0)
    lse = torch.logsumexp(scores[:, ~blind], -1)
    full = scores.new_full((q.shape[1], q.shape[0]), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", p, v.repeat_interleave(group, 1)), full.index_put(
        (torch.arange(q.shape[1])[:, None], (~blind).nonzero()[:, 0][None]), lse
    )


def inputs(case: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v (views of one packed tensor where the shapes allow it) and upstream gradients."""
    lengths, lengths_k, heads, heads_k, dim, _ = CASES[case]
    n, m = sum(lengths), sum(lengths_k)
    if (n, heads) == (m, heads_k):
        tensors = list(randn(n, 3, heads, dim, dtype=dtype).unbind(1))
    else:
        tensors = [randn(n, heads, dim + 8, dtype=dtype)[..., :dim]]
        tensors += list(randn(m, 2, heads_k, dim, dtype=dtype).unbind(1))
    return tensors, randn(n, heads, dim, dtype=dtype, seed=1), randn(heads, n, seed=2)


def run(fn: Any, tensors: list[Tensor], dtype: torch.dtype, dout: Tensor, dlse: Tensor) -> Any:
    """out, lse, dq, dk, dv of `fn`; the gradient of a row that sees nothing is not asked for."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    with poisoned():
        out, lse = fn(*leaves)
        finite = torch.isfinite(lse.detach())
        (out.to(dout.dtype) * dout).sum().add((lse * dlse)[finite].sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def attention(case: str, chosen: str) -> Any:
    lengths, lengths_k, *_, causal = CASES[case]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with backend.use_backend(chosen):
            return packed_attention(
                q, k, v, cu_seqlens=cu(lengths), cu_seqlens_k=cu(lengths_k), causal=causal,
                return_lse=True,
            )  # fmt: skip

    return call


GRID = [("native", dtype, case) for dtype in DTYPES for case in CASES]
GRID += [("triton", "fp32", case) for case in CASES if case != "long-hd64"]
GRID += [("triton", "fp16", "gqa-hd72"), ("triton", "bf16", "causal-hd32")]
GRID += [("reference", "bf16", "gqa-hd72"), ("reference", "fp32", "mqa-causal-cross-hd24")]


@pytest.mark.parametrize(("chosen", "dtype_name", "case"), GRID)
def test_matches_the_oracle(chosen: str, dtype_name: str, case: str) -> None:
    dtype = DTYPES[dtype_name]
    lengths, lengths_k, *_, causal = CASES[case]
    tensors, dout, dlse = inputs(case, dtype)
    wide = dout.double()
    got = run(attention(case, chosen), tensors, dtype, dout.to(torch.float64), dlse)
    exact = run(
        lambda q, k, v: oracle(q, k, v, lengths, lengths_k, causal),
        tensors, torch.float64, wide, dlse.double(),
    )  # fmt: skip
    lowp = run(
        lambda q, k, v: packed_attention_reference(
            q, k, v, lengths, lengths_k, q.shape[-1] ** -0.5, causal
        ),
        tensors, dtype, wide, dlse,
    )  # fmt: skip
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    blind = torch.isinf(exact[1])
    assert torch.equal(torch.isinf(got[1]), blind)
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        results = [
            r[i].masked_fill(blind, 0.0) if name == "lse" else r[i] for r in (got, exact, lowp)
        ]
        slack = 1.0 if chosen == "triton" and dtype is torch.bfloat16 else 0.0
        if case == "one-token-hd128":
            # The softmax of one key is 1 whatever its score, so the reference errs by nothing and
            # the gradients are what is left of terms that cancel: only their rounding remains.
            slack += 16.0
        if name == "lse" and chosen == "native" and dtype is not torch.float32:
            slack += 128.0  # PyTorch's half-precision CPU kernel has an exponential of 20 bits
        check(*results, grad=i > 1, extra_ulp=slack, name=name)


@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_a_segment_computes_the_same_bits_in_any_pack(chosen: str) -> None:
    lengths = [20, 0, 37]
    q, k, v = randn(57, 3, 1, 16).unbind(1)
    dout = randn(57, 1, 16, seed=1)

    def call(rows: slice, lengths: list[int]) -> list[Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        with backend.use_backend(chosen):
            out, lse = packed_attention(*leaves, cu_seqlens=cu(lengths), return_lse=True)
        out.backward(dout[rows])
        return [out, lse.mT, *(x.grad for x in leaves)]

    packed = call(slice(0, 57), lengths)
    for rows, length in ((slice(0, 20), 20), (slice(20, 57), 37)):
        for name, whole, alone in zip(
            ("out", "lse", "dq", "dk", "dv"), packed, call(rows, [length]), strict=True
        ):
            assert torch.equal(whole[rows], alone), name


def test_a_layout_with_capacity_gives_the_same_bits() -> None:
    segments = [[Text(3), Grid(1, 2, 4)], [Text(21)]]
    exact, roomy = PackedLayout(segments), PackedLayout(segments, capacity=48)
    q, k, v = randn(48, 3, 1, 16).unbind(1)
    with backend.use_backend("triton"):
        want = packed_attention(q[:32], k[:32], v[:32], exact)
        got = packed_attention(q, k, v, roomy)
    assert torch.isfinite(got).all()
    assert torch.equal(got[:32], want)


@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_three_runs_give_the_same_bits(chosen: str) -> None:
    case = "hd5" if chosen == "triton" else "mqa-causal-cross-hd24"
    tensors, dout, dlse = inputs(case, torch.float32)
    runs = [run(attention(case, chosen), tensors, torch.float32, dout, dlse) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_permuting_segments_permutes_outputs(lengths: list[int], random: Any) -> None:
    q, k, v = randn(sum(lengths), 3, 2, 16).unbind(1)
    order = list(range(len(lengths)))
    random.shuffle(order)
    starts = cu(lengths).tolist()
    index = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
    out = packed_attention(q, k, v, cu_seqlens=cu(lengths))
    moved = packed_attention(
        q[index], k[index], v[index], cu_seqlens=cu([lengths[i] for i in order])
    )
    assert torch.equal(out[index], moved)


@pytest.mark.parametrize("chosen", ["reference", "native", "triton"])
def test_only_asked_gradients_and_lse_alone(chosen: str) -> None:
    q, k, v = randn(24, 3, 1, 16).unbind(1)
    q = q.detach().requires_grad_()
    with backend.use_backend(chosen):
        lse = packed_attention(q, k, v, cu_seqlens=cu([24]), return_lse=True)[1]
    lse.sum().backward()
    exact_q = q.detach().double().requires_grad_()
    oracle(exact_q, k.double(), v.double(), [24], [24], False)[1].sum().backward()
    torch.testing.assert_close(q.grad, exact_q.grad.float(), atol=1e-5, rtol=1e-5)
    assert k.grad is None


@pytest.mark.parametrize("chosen", ["reference", "native", "triton"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(chosen: str, lengths: list[int]) -> None:
    q = torch.zeros(0, 2, 16, requires_grad=True)
    with backend.use_backend(chosen):
        out, lse = packed_attention(q, q, q, cu_seqlens=cu(lengths), return_lse=True)
    out.sum().backward()
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    assert q.grad is not None


@pytest.mark.parametrize("chosen", ["reference", "native", "triton"])
def test_no_keys_at_all(chosen: str) -> None:
    q, k = randn(3, 1, 16).requires_grad_(), randn(0, 1, 16).requires_grad_()
    with backend.use_backend(chosen), poisoned():
        out, lse = packed_attention(
            q, k, k, cu_seqlens=cu([3]), cu_seqlens_k=cu([0]), return_lse=True
        )
        out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_expanded_gradient(chosen: str) -> None:
    q, k, v = (x.detach().requires_grad_() for x in randn(20, 3, 2, 16).unbind(1))
    with backend.use_backend(chosen):
        packed_attention(q, k, v, cu_seqlens=cu([12, 8])).sum().backward()
    torch.testing.assert_close(v.grad.sum(0), torch.full((2, 16), 20.0))


def test_merge_of_two_halves_of_the_keys_is_the_whole() -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in randn(30, 3, 2, 16).unbind(1))
    whole = packed_attention(q, k, v, cu_seqlens=cu([30]), return_lse=True)
    halves = [
        packed_attention(
            q, k[rows], v[rows], cu_seqlens=cu([30]), cu_seqlens_k=cu([n]), return_lse=True
        )
        for rows, n in ((slice(0, 11), 11), (slice(11, 30), 19))
    ]
    merged = merge(*halves[0], *halves[1])
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want)
        seed = randn(*want.shape).double()
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), seed, retain_graph=True, allow_unused=True),
            torch.autograd.grad(want, (q, k, v), seed, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if a is not None or b is not None:  # the lse does not depend on v
                torch.testing.assert_close(a, b)


def test_merge_where_one_side_or_both_saw_nothing() -> None:
    out = randn(3, 1, 4)
    lse, nothing = randn(1, 3), torch.full((1, 3), float("-inf"))
    got, got_lse = merge(out, lse, torch.zeros_like(out), nothing)
    assert torch.equal(got, out)
    torch.testing.assert_close(got_lse, lse)
    zero = torch.zeros_like(out)
    got, got_lse = merge(zero, nothing, zero, nothing)
    assert torch.equal(got, zero)
    assert torch.equal(got_lse, nothing)
    with pytest.raises(ValueError, match="lse2"):
        merge(out, lse, out, lse[:, :2])


# --- work lists and configurations --------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), max_size=8), st.sampled_from([16, 32, 128]))
def test_work_list_covers_every_block_once_longest_first(lengths: list[int], block: int) -> None:
    work = work_list(cu(lengths), sum(lengths), block)
    assert work.dtype == torch.int32
    real = [tuple(row) for row in work.tolist() if row[0] >= 0]
    assert sorted(real) == [
        (s, b) for s, length in enumerate(lengths) for b in range(-(-length // block))
    ]
    visited = [lengths[s] for s, _ in real]
    assert visited == sorted(visited, reverse=True)
    layout = PackedLayout([[Text(length)] for length in lengths])
    assert [tuple(row) for row in layout.work(block).tolist()] == real


def test_configs_fit_every_head_dim() -> None:
    for head_dim in range(1, 257):
        dim1, dim2 = split_head_dim(head_dim)
        assert dim1 + dim2 >= head_dim
        assert all(d in (0, 16, 32, 64, 128, 256) for d in (dim1, dim2))
        assert dim2 == 0 or dim2 < dim1 < head_dim
        for capability in ((8, 0), (9, 0), (10, 0), (12, 0), None):
            config = choose_config(head_dim, torch.bfloat16, capability)
            assert (config.dim1, config.dim2) == (dim1, dim2)
        for dtype in (torch.float32, torch.bfloat16):
            config = choose_config(head_dim, dtype, (9, 0))
            assert config.fwd.block_n >= 32  # halved at the edges; tl.dot needs 16
    assert split_head_dim(72) == (64, 16)
    assert split_head_dim(96) == (64, 32)
    assert split_head_dim(112) == (128, 0)


# --- torch integration --------------------------------------------------------------------------


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_fast_path_fires() -> None:
    q = randn(8, 1, 16).requires_grad_()
    with _Log() as log:
        packed_attention(q, q, q, cu_seqlens=cu([8])).sum().backward()
    assert "sora_kernels.packed_attention_fwd.default" in log.ops
    assert "sora_kernels.packed_attention_bwd.default" in log.ops


def _raw(requires_grad: bool = False) -> tuple[Any, ...]:
    q, k, v = (x.detach().requires_grad_(requires_grad) for x in randn(12, 3, 2, 16).unbind(1))
    return (q, k, v, cu([5, 7]), cu([5, 7]), None, 12, 12, 0.25, False)


def test_opcheck() -> None:
    ops = torch.ops.sora_kernels
    args = _raw()
    torch.library.opcheck(ops.packed_attention_fwd.default, args)
    out, lse = ops.packed_attention_fwd(*args)
    for dlse, needs in ((None, (True, True)), (torch.ones_like(lse), (True, False))):
        bwd = (randn(12, 2, 16), dlse, *args[:3], out, lse, *args[3:5], None, None, *args[6:])
        torch.library.opcheck(ops.packed_attention_bwd.default, (*bwd, *needs))


def test_raw_op_under_grad_raises() -> None:
    with pytest.raises(RuntimeError, match="packed_attention_fwd has no gradient"):
        torch.ops.sora_kernels.packed_attention_fwd(*_raw(requires_grad=True))


def test_compiles_without_a_graph_break_and_without_recompiling_per_pack() -> None:
    frames = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return packed_attention(q, k, v, layout) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for lengths in ((5, 9), (3, 17), (8, 30), (21, 2), (6, 6)):
        layout = PackedLayout([[Text(n), Grid(1, 2, 2)] for n in lengths])
        q, k, v = (x.requires_grad_() for x in randn(3, layout.num_tokens, 2, 16).unbind(0))
        got = compiled(q, k, v, layout)
        want = attend(q, k, v, layout)
        assert torch.equal(got, want)
        dout = randn(*want.shape, seed=1)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), dout),
            torch.autograd.grad(want, (q, k, v), dout),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert frames <= 3


# --- bad input ----------------------------------------------------------------------------------

Q = torch.zeros(6, 2, 16)


def pack(length: int, device: str = "cpu") -> PackedLayout:
    return PackedLayout([[Text(length)]], device=device)


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "cu_seqlens: expected to rise from 0 to 6", {"cu_seqlens": cu([3, 4])}),
        (ValueError, "cu_seqlens: expected to rise", {"cu_seqlens": cu([8, -2])}),
        (ValueError, "cu_seqlens: expected int32", {"cu_seqlens": cu([6]).float()}),
        (ValueError, "cu_seqlens: expected int32", {"cu_seqlens": cu([6]).long()}),
        (ValueError, "cu_seqlens: expected shape", {"cu_seqlens": cu([6])[None]}),
        (ValueError, "cu_seqlens: expected the device", {"cu_seqlens": cu([6]).to("meta")}),
        (TypeError, "cu_seqlens: expected an int32 tensor", {"cu_seqlens": [0, 6]}),
        (ValueError, "got neither", {"cu_seqlens": None}),
        (ValueError, "got both", {"layout": pack(6)}),
        (ValueError, "layout: expected 6 tokens", {"layout": pack(5), "cu_seqlens": None}),
        (ValueError, "layout: expected the dev", {"layout": pack(6, "meta"), "cu_seqlens": None}),
        (ValueError, "cu_seqlens_k: expected 1 segments", {"cu_seqlens_k": cu([3, 3])}),
        (ValueError, "cu_seqlens_k: expected to rise", {"cu_seqlens_k": cu([5])}),
        (ValueError, "cu_seqlens_k: expected one", {"k": Q[:4], "v": Q[:4]}),
        (ValueError, "v: expected the shape of k", {"v": Q[:4]}),
        (ValueError, "head dim of 1 to 256", {name: torch.zeros(6, 2, 257) for name in "qkv"}),
        (ValueError, "k: expected the head dim", {name: torch.zeros(6, 2, 8) for name in "kv"}),
        (ValueError, "divides q's 2", {name: torch.zeros(6, 3, 16) for name in "kv"}),
        (ValueError, "q: expected \\[tokens", {"q": Q[0]}),
        (ValueError, "q: expected stride 1", {"q": torch.zeros(6, 16, 2).mT}),
        (ValueError, "k: expected the device", {"k": Q.to("meta")}),
        (TypeError, "k: expected the dtype", {"k": Q.half()}),
        (TypeError, "q: expected fp32", {"q": Q.int()}),
        (TypeError, "v: expected a tensor", {"v": None}),
        (ValueError, "softmax_scale", {"softmax_scale": float("nan")}),
        (ValueError, "softmax_scale", {"softmax_scale": -1.0}),
    ],
)  # fmt: skip
def test_bad_input_is_named(error: type[Exception], match: str, kwargs: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": Q, "v": Q, "cu_seqlens": cu([6]), **kwargs}
    with pytest.raises(error, match=match):
        packed_attention(**arguments)
