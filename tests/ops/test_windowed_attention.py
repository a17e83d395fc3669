"""packed_attention with a window: native and reference against masks made by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, backend, packed_attention
from sora_kernels.ops.windowed_attention import cpu
from sora_kernels.ops.windowed_attention.reference import windowed_attention_reference
from tests.helpers import check, poisoned, randn
from tests.ops.windowed import (
    GIVEN,
    IMAGE,
    VIDEO,
    attention,
    layouts,
    masked_attention,
    raster_mask,
    windows,
)

LONG = [Text(9), Grid(5, 8, 8, tile=(2, 4, 4))]  # beyond what the CPU backward widens
# Parts; window; heads, key heads, head dim.
CASES: dict[str, tuple[list[Any], Window, int, int, int]] = {
    "clamped": ([VIDEO, IMAGE], Window((3, 3, 3)), 2, 2, 64),
    "truncated-gqa": ([GIVEN, VIDEO], Window((1, 3, 3), "truncate"), 4, 2, 24),
    "one-tile-mqa": ([VIDEO, GIVEN], Window((1, 1, 1)), 2, 1, 32),
    "causal-sink": ([GIVEN, VIDEO, [Text(4)]], Window((2, 3, None), causal=True, sink=1), 2, 2, 16),
    "causal-by-frames": ([VIDEO], Window((None, None, None), causal=True), 1, 1, 72),
    "sink-whole-axis": ([VIDEO, []], Window((1, None, 1), sink=1), 1, 1, 5),
    "wider-than-the-grid": ([IMAGE, VIDEO], Window((9, 9, 9)), 2, 1, 16),
    "long": ([LONG], Window((1, 3, 1), sink=1), 1, 1, 64),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ("out", "lse", "dq", "dk", "dv")


def tensors(layout: PackedLayout, heads: int, heads_k: int, dim: int, dtype: Any) -> list[Tensor]:
    """q, k, v, in raster order; views of one packed tensor where the shapes allow it."""
    n = layout.num_tokens
    if heads == heads_k:
        return list(randn(n, 3, heads, dim, dtype=dtype).unbind(1))
    return [randn(n, heads, dim + 8, dtype=dtype)[..., :dim],
            *randn(n, 2, heads_k, dim, dtype=dtype).unbind(1)]  # fmt: skip


def run(fn: Any, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of `fn(q, k, v)` for seeded upstream gradients of both results."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in given]
    with poisoned():
        out, lse = fn(*leaves)
        dout = randn(*out.shape, dtype=given[0].dtype, seed=1).double()
        loss = (out.double() * dout).sum() + (lse.double() * randn(*lse.shape, seed=2)).sum()
        loss.backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def in_tile_order(layout: PackedLayout, fn: Any) -> Any:
    """`fn` of tensors in tile order as a function of tensors in raster order."""

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        places = layout.raster_of_token
        assert places is not None
        out, lse = fn(*(x[places] for x in given))
        return (
            torch.zeros_like(out).index_copy(0, places, out),
            torch.zeros_like(lse).index_copy(1, places, lse),
        )

    return call


def oracle(layout: PackedLayout, window: Window, dim: int) -> Any:
    seen = raster_mask(layout, window)
    return lambda q, k, v: masked_attention(q, k, v, seen, dim**-0.5)


MATRIX = [("native", dtype, case) for dtype in DTYPES for case in CASES]
MATRIX += [("reference", "fp32", case) for case in CASES] + [("reference", "bf16", "clamped")]


@pytest.mark.parametrize(("chosen", "dtype_name", "case"), MATRIX)
def test_equals_masked_attention_in_raster_order(chosen: str, dtype_name: str, case: str) -> None:
    dtype = DTYPES[dtype_name]
    parts, window, heads, heads_k, dim = CASES[case]
    layout = PackedLayout(parts, order="tile")
    given = tensors(layout, heads, heads_k, dim, dtype)
    got = run(in_tile_order(layout, attention(layout, window, chosen)), given, dtype)
    exact = run(oracle(layout, window, dim), given, torch.float64)
    lowp = run(
        in_tile_order(
            layout,
            lambda q, k, v: windowed_attention_reference(q, k, v, layout, window, dim**-0.5),
        ),
        given, dtype,
    )  # fmt: skip
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for name, *results in zip(NAMES, got, exact, lowp, strict=True):
        # PyTorch's half-precision CPU kernel has an exponential of 20 bits
        half = name == "lse" and chosen == "native" and dtype is not torch.float32
        check(*results, grad=name.startswith("d"), extra_ulp=128.0 if half else 0.0, name=name)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(layouts(), windows(), st.sampled_from([(1, 1, 8), (2, 1, 5), (2, 2, 16)]))
def test_random_packs(layout: PackedLayout, window: Window, shape: tuple[int, int, int]) -> None:
    given = tensors(layout, *shape, torch.float64)
    exact = run(oracle(layout, window, shape[-1]), given, torch.float64)
    for chosen, dtype, atol in (
        ("reference", torch.float64, 1e-12), ("native", torch.float32, 2e-5),
    ):  # fmt: skip
        got = run(in_tile_order(layout, attention(layout, window, chosen)), given, dtype)
        for name, a, b in zip(NAMES, got, exact, strict=True):
            torch.testing.assert_close(
                a.double(), b, atol=atol, rtol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
            )


# --- relations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_a_window_over_the_grid_is_no_window(dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    layout = PackedLayout([VIDEO, GIVEN, LONG, LONG], order="tile")
    given = tensors(layout, 2, 1, 16, dtype)
    dense = run(lambda *x: packed_attention(*x, layout, return_lse=True), given, dtype)
    for window in ((None, None, None), (9, 9, 9)):
        got = run(attention(layout, window, "native"), given, dtype)
        for name, a, b in zip(NAMES, got, dense, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_a_segment_computes_the_same_bits_in_any_pack(dtype_name: str) -> None:
    dtype, window = DTYPES[dtype_name], Window((3, 1, 3), sink=1)
    packs = [LONG, [], VIDEO, LONG, [Text(6)], GIVEN, VIDEO, VIDEO]
    layout = PackedLayout(packs, order="tile")
    given = tensors(layout, 2, 2, 16, dtype)
    dout = randn(layout.num_tokens, 2, 16, dtype=dtype, seed=1)

    def call(layout: PackedLayout, rows: slice) -> list[Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in given]
        out, lse = packed_attention(*leaves, layout, window=window, return_lse=True)
        out.backward(dout[rows])
        return [out, lse.mT, *(x.grad for x in leaves)]

    packed = call(layout, slice(None))
    ends = layout.cu_seqlens.tolist()
    for number, parts in enumerate(packs):
        rows = slice(ends[number], ends[number + 1])
        alone = call(PackedLayout([parts], order="tile"), rows)
        for name, a, b in zip(NAMES, packed, alone, strict=True):
            assert torch.equal(a[rows], b), (number, name)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.permutations([VIDEO, GIVEN, IMAGE, [Text(3)], [], VIDEO]), windows(),
)  # fmt: skip
def test_permuting_segments_permutes_outputs(packs: list[Any], window: Window) -> None:
    order = sorted(range(len(packs)), key=lambda i: str(packs[i]))
    layout = PackedLayout(packs, order="tile")
    moved = PackedLayout([packs[i] for i in order], order="tile")
    q, k, v = tensors(layout, 1, 1, 16, torch.float32)
    ends = layout.cu_seqlens.tolist()
    index = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in order])
    out = packed_attention(q, k, v, layout, window=window)
    got = packed_attention(q[index], k[index], v[index], moved, window=window)
    assert torch.equal(out[index], got)


def test_three_runs_give_the_same_bits() -> None:
    layout = PackedLayout([VIDEO, LONG], order="tile")
    given = tensors(layout, 2, 1, 16, torch.bfloat16)
    runs = [run(attention(layout, (1, 3, 3), "native"), given, torch.bfloat16) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_a_layout_with_capacity_gives_the_same_bits() -> None:
    exact = PackedLayout([VIDEO, IMAGE], order="tile")
    roomy = PackedLayout([VIDEO, IMAGE], order="tile", capacity=256)
    q, k, v = randn(256, 3, 1, 16).unbind(1)
    n = exact.num_tokens
    for chosen in ("native", "reference"):
        with backend.use_backend(chosen):
            want = packed_attention(q[:n], k[:n], v[:n], exact, window=(1, 3, 3))
            got = packed_attention(q, k, v, roomy, window=(1, 3, 3))
        assert torch.isfinite(got).all()
        assert torch.equal(got[:n], want)


def test_the_future_does_not_reach_the_past() -> None:
    """Also not through text, which sees no grid in causal time."""
    layout = PackedLayout([[Text(3), Grid(4, 2, 4, tile=(1, 2, 2)), Text(2)]], order="tile")
    window = Window((2, 1, 3), causal=True, sink=1)
    x = randn(layout.num_tokens, 1, 16)
    changed = x.clone()
    changed[3 + 2 * 8 : 3 + 4 * 8] += 1.0  # frames 2 and 3
    for _ in range(3):  # layers
        x, changed = (packed_attention(y, y, y, layout, window=window) for y in (x, changed))
    same = torch.ones(layout.num_tokens, dtype=torch.bool)
    same[3 + 2 * 8 : 3 + 4 * 8] = False
    assert torch.equal(x[same], changed[same])
    assert not torch.equal(x[~same], changed[~same])


# --- cost ---------------------------------------------------------------------------------------


def test_masked_pairs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [[Text(4), Grid(6, 12, 12, tile=(2, 3, 3)), Text(2)], [Grid(1, 16, 16, tile=(1, 4, 4))]]
    layout = PackedLayout(parts, order="tile")
    pairs = {"_forward": 0, "_backward": 0}

    def counted(name: str, place: int) -> None:
        run = getattr(cpu, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            q, k = args[place : place + 2]
            pairs[name] += q.shape[0] * q.shape[2] * k.shape[2]
            return run(*args, **kwargs)

        monkeypatch.setattr(cpu, name, call)

    counted("_forward", 0)
    counted("_backward", 1)
    q, k, v = (x.requires_grad_() for x in randn(3, layout.num_tokens, 1, 8).unbind(0))
    for window in (Window((3, 3, 3)), Window((2, 1, 3), causal=True, sink=1), Window((1, 1, 1))):
        pairs.update(_forward=0, _backward=0)
        packed_attention(q, k, v, layout, window=window).sum().backward()
        formula = layout.window_pairs(window)
        assert pairs == {"_forward": formula, "_backward": formula}
        assert formula < 0.6 * sum(n * n for n in layout.seqlens)


def test_a_second_layer_plans_nothing() -> None:
    layout = PackedLayout([VIDEO, IMAGE], order="tile")
    q = randn(layout.num_tokens, 1, 8).requires_grad_()
    packed_attention(q, q, q, layout, window=(1, 3, 3))
    before = cpu.pack_batches.cache_info()
    packed_attention(q, q, q, layout, window=(1, 3, 3)).sum().backward()
    after = cpu.pack_batches.cache_info()
    assert after.misses == before.misses
    assert after.hits == before.hits + 2


def test_copied_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches split when their copies get large; the result is the same."""
    layout = PackedLayout([LONG] * 3, order="tile")
    q, k, v = tensors(layout, 2, 2, 16, torch.float32)
    want = packed_attention(q, k, v, layout, window=(1, 1, 1))
    monkeypatch.setattr(cpu, "GATHERED", 1)
    cpu_batches = cpu._plan(
        k, layout.cu_seqlens, layout.window_table(), Window((1, 1, 1)).as_ints()
    )
    assert all(batch.size == 1 for batch in cpu_batches)
    assert torch.equal(packed_attention(q, k, v, layout, window=(1, 1, 1)), want)
