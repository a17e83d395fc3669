"""Dense and windowed attention read by tensor descriptors: the same bits as by pointers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorDescHandle

from sora_kernels import Grid, PackedLayout, Text, Window, backend, packed_attention
from sora_kernels.aot import ARCHS
from sora_kernels.ops.packed_attention import aot_cases as dense_cases
from sora_kernels.ops.packed_attention import config as configs
from sora_kernels.ops.packed_attention.aot_cases import HEAD_DIMS
from sora_kernels.ops.packed_attention.config import (
    Launch,
    choose_config,
    describable,
    forced_descriptors,
    wants_descriptors,
)
from sora_kernels.ops.windowed_attention import aot_cases as windowed_cases
from sora_kernels.ops.windowed_attention.config import choose_config as choose_windowed_config
from tests.helpers import poisoned, randn

NAMES = ("out", "lse", "dq", "dk", "dv")
KINDS = ("fwd", "dq", "dkv")


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shape", "strides", "itemsize", "expected"),
    [
        (0, (9, 4, 72), (864, 72, 1), 2, True),  # a view of a packed QKV
        (32, (9, 4, 72), (864, 72, 1), 2, True),
        (8, (9, 4, 72), (864, 72, 1), 2, False),  # a base between multiples of 16 bytes
        (0, (9, 4, 100), (1200, 100, 1), 2, False),  # heads of 200 bytes
        (0, (9, 4, 100), (1200, 100, 1), 4, True),  # of 400
        (0, (9, 4, 72), (868, 72, 1), 2, False),  # rows of 1736 bytes
        (0, (9, 4, 72), (0, 72, 1), 2, False),  # an expanded tensor
        (0, (9, 4, 72), (864, 72, 2), 2, False),
        (0, (0, 4, 72), (864, 72, 1), 2, False),  # nothing there
        (0, (9, 4, 72), (2**34, 72, 1), 2, False),
    ],
)
def test_what_a_descriptor_can_say(
    address: int, shape: Any, strides: Any, itemsize: int, expected: bool
) -> None:
    assert describable(address, shape, strides, itemsize) is expected


@pytest.mark.parametrize("choose", [choose_config, choose_windowed_config])
def test_half_precision_on_hopper_and_newer_reads_by_descriptors(choose: Any) -> None:
    for head_dim, major in itertools.product((64, 72, 96), (9, 10, 12)):
        config = choose(head_dim, torch.bfloat16, (major, 0))
        assert config.fwd.descriptors
        assert config.dq.descriptors == config.dkv.descriptors == (major < 12)
    for dtype, capability in (
        (torch.bfloat16, (8, 0)),
        (torch.float32, (9, 0)),
        (torch.half, None),
    ):
        config = choose(128, dtype, capability)
        assert not any(getattr(config, kind).descriptors for kind in KINDS)


def test_a_launch_asks_for_aligned_tensors() -> None:
    launch = Launch(32, 32, 1, 1, descriptors=True)
    aligned = torch.zeros(4, 2, 16)
    shifted = torch.zeros(130)[1:129].view(4, 2, 16)
    assert wants_descriptors(launch, aligned, aligned)
    assert not wants_descriptors(launch, aligned, shifted)
    assert not wants_descriptors(Launch(32, 32, 1, 1), aligned)
    with forced_descriptors(True), pytest.raises(ValueError, match="multiples of 16 bytes, got"):
        wants_descriptors(launch, shifted)
    with forced_descriptors(False):
        assert not wants_descriptors(launch, aligned)
    assert configs._forced is None


@pytest.mark.parametrize(
    ("listing", "choose"),
    [(dense_cases, choose_config), (windowed_cases, choose_windowed_config)],
    ids=["dense", "windowed"],
)
def test_the_cross_compiler_sees_both_ways_of_reading(listing: Any, choose: Any) -> None:
    """Every head dim and direction on every chip; what reads by descriptors also by pointers."""
    found = {}
    for case in listing.aot_cases():
        kind, width, dtype = case.name.split("_")[:3]
        for arch in case.archs:
            found[kind, width, dtype, arch, case.descriptors > 0] = case.descriptors
    for head_dim, kind, arch in itertools.product(HEAD_DIMS, KINDS, ARCHS):
        config = choose(head_dim, torch.bfloat16, divmod(arch, 10))
        name = (kind, f"hd{head_dim}", "bf16", arch)
        assert (*name, False) in found
        descriptors = getattr(config, kind).descriptors
        assert ((*name, True) in found) == descriptors
        if descriptors:  # of two tensors, in the dense forward in two heights
            parts = 2 if config.dim2 else 1
            heights = 2 if (kind, listing) == ("fwd", dense_cases) else 1
            assert found[(*name, True)] == 2 * parts * heights


# --- bits ---------------------------------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ranks of the descriptors that the interpreter loads by."""
    ranks: list[int] = []
    load = TensorDescHandle.materialize_pointers

    def spy(self: TensorDescHandle, offsets: Any) -> Any:
        ranks.append(self.ndim)
        return load(self, offsets)

    with monkeypatch.context() as patch:
        patch.setattr(TensorDescHandle, "materialize_pointers", spy)
        yield ranks


def run(fn: Any, tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv of `fn(q, k, v)`."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with poisoned(), backend.use_backend("triton"):
        out, lse = fn(*leaves)
        out.backward(dout)
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def dense(lengths: list[int], lengths_k: list[int], causal: bool) -> Any:
    cu, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths, lengths_k)
    )
    return lambda q, k, v: packed_attention(
        q, k, v, cu_seqlens=cu, cu_seqlens_k=cu_k, causal=causal, return_lse=True
    )


def windowed(layout: PackedLayout, window: Window) -> Any:
    return lambda q, k, v: packed_attention(q, k, v, layout, window=window, return_lse=True)


# Lengths of queries and keys; heads, key heads, head dim; dtype; causal. Blocks hold 32 rows.
DENSE = {
    "packed-qkv-hd72": ([37, 0, 5], [37, 0, 5], 1, 1, 72, torch.float16, False),
    "cross-gqa-hd128": ([40, 9], [33, 64], 2, 1, 128, torch.float32, False),
    "causal-hd96": ([66], [66], 1, 1, 96, torch.float16, True),
    "bf16-hd8": ([33, 3], [33, 3], 1, 1, 8, torch.bfloat16, False),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_bits_are_those_of_pointers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, lengths_k, heads, heads_k, dim, dtype, causal = DENSE[case]
    n, m = sum(lengths), sum(lengths_k)
    if heads == heads_k and n == m:
        tensors = list(randn(n, 3, heads, dim, dtype=dtype).unbind(1))
    else:
        kv = randn(m, 2, heads_k, dim, dtype=dtype, seed=1)
        tensors = [randn(n, heads, dim, dtype=dtype), *kv.unbind(1)]
    fn, dout = dense(lengths, lengths_k, causal), randn(n, heads, dim, dtype=dtype, seed=2)
    with counted(monkeypatch) as ranks, forced_descriptors(False):
        want = run(fn, tensors, dout)
    assert not ranks
    with counted(monkeypatch) as ranks, forced_descriptors(True):
        got = run(fn, tensors, dout)
    assert ranks
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b), name


FRAMES = [Grid(2, 2, 2, tile=(1, 2, 2)), Text(2)]
IMAGE = [Grid(1, 7, 5, tile=(1, 4, 5))]  # two blocks of 16 rows in the first tile
WINDOWED = {
    "clamped-hd72": ([IMAGE, [Text(3)]], Window((1, 1, 1)), 1, 1, 72, torch.float16),
    "causal-sink-gqa-hd16": ([FRAMES], Window((2, 1, 1), causal=True, sink=1), 2, 1, 16,
                             torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWED)
def test_windowed_bits_are_those_of_pointers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, window, heads, heads_k, dim, dtype = WINDOWED[case]
    layout = PackedLayout(parts, order="tile")
    n = layout.num_tokens
    tensors = [randn(n, heads, dim, dtype=dtype)]
    tensors += list(randn(n, 2, heads_k, dim, dtype=dtype, seed=1).unbind(1))
    fn, dout = windowed(layout, window), randn(n, heads, dim, dtype=dtype, seed=2)
    with forced_descriptors(False):
        want = run(fn, tensors, dout)
    with counted(monkeypatch) as ranks, forced_descriptors(True):
        got = run(fn, tensors, dout)
    assert ranks
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b), name


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_a_neighbouring_segment_holds_does_not_matter(bad: float, descriptors: bool) -> None:
    """Blocks reach over the end of the middle segment; 0 * NaN would be NaN."""
    lengths, rows = [7, 37, 9], slice(7, 44)
    qkv, dout = randn(53, 3, 1, 16), randn(53, 1, 16, seed=1)
    with forced_descriptors(descriptors):
        alone = run(dense([37], [37], False), list(qkv[rows].unbind(1)), dout[rows])
        for x in (qkv, dout):
            x[:7] = bad
            x[44:] = bad
        got = run(dense(lengths, lengths, False), list(qkv.unbind(1)), dout)
    got[1], alone[1] = got[1].mT, alone[1].mT
    for name, a, b in zip(NAMES, got, alone, strict=True):
        assert torch.equal(a[rows], b), name


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_what_lies_outside_the_window_does_not_matter(descriptors: bool) -> None:
    """Runs of 6 rows in blocks of 16: each block reaches into tiles that nobody here sees."""
    layout = PackedLayout([[Grid(1, 3, 6, tile=(1, 3, 2))]], order="tile")
    fn = windowed(layout, Window((1, 1, 1)))
    qkv, dout = randn(18, 3, 1, 16), randn(18, 1, 16, seed=1)
    with forced_descriptors(descriptors):
        want = run(fn, list(qkv.unbind(1)), dout)
        for x in (qkv, dout):  # the tile in the middle; those beside it do not see it
            x[6:12] = float("nan")
        got = run(fn, list(qkv.unbind(1)), dout)
    for x in (got, want):
        x[1] = x[1].mT
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a[6:12].isnan().all(), name
        for rows in (slice(0, 6), slice(12, 18)):
            assert torch.equal(a[rows], b[rows]), name
