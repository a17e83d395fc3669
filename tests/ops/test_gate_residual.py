"""gate_residual against its fp64 definition: every implementation, convention, layout, gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sora_kernels import RowMap, gate_residual, use_backend
from sora_kernels.ops import _config
from tests.helpers import randn
from tests.ops.gated import (
    BACKENDS,
    BY_BACKEND,
    DTYPES,
    ROW_PATTERNS,
    assert_law,
    compare,
    leaf,
    length,
    make,
    map_of,
    run,
)

SANDWICH = {"tanh": True, "norm": "rms"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_dtypes_and_norms(backend: str, dtypes: Any, norm: str | None) -> None:
    names = "y gate" if norm is None else "y gate weight"
    compare(gate_residual, backend, make((3, 7, 100), (3,), names), dtypes, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 63, 72, 128, 1152, 3072, 5120])
def test_widths(backend: str, width: int) -> None:
    """5120 is cut into column slices without a norm, and held whole with one."""
    for options in ({}, SANDWICH):
        compare(gate_residual, backend, make((2, 3, width), (2,), "y gate"), eps=1e-2, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("y", {}),
        ("y gate gate_table", {}),
        ("y gate", {"tanh": True}),
        ("y gate gate_table", {"tanh": True}),
        ("y gate", SANDWICH),
        ("y gate gate_table weight", SANDWICH),
        ("y weight", {"norm": "layer"}),
        ("y", {"norm": "rms"}),
    ],
    ids=str,
)
def test_optional_parts(backend: str, names: str, options: dict[str, Any]) -> None:
    arguments = make((2, length(backend, 37), 40), (2,), names)
    compare(gate_residual, backend, arguments, **options)
    compare(gate_residual, backend, arguments, (torch.float32, torch.bfloat16), **options)


@pytest.mark.parametrize(("backend", "per", "shape", "lead"), BY_BACKEND)
def test_granularities(
    backend: str, per: str, shape: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    compare(gate_residual, backend, make(shape, lead, "y gate"), per=per, tanh=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_rows(backend: str, pattern: str) -> None:
    # more than three blocks of the CPU kernel's backward, more than one of Triton's forward
    tokens = length(backend, 101, 35)
    count = tokens if pattern == "a row a token" else 6
    rows = map_of(pattern, tokens, count)
    arguments = make((tokens, 40), (count,), "y gate")
    compare(gate_residual, backend, arguments, rows=rows)
    compare(gate_residual, backend, arguments, rows=rows, **SANDWICH)


def test_rows_with_long_blocks_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few programs that each of the backward sums several tokens."""
    monkeypatch.setattr(_config, "MAX_PROGRAMS", 10)  # blocks of 4 tokens, rows of 7
    rows = map_of("runs", 35, 5)
    compare(gate_residual, "triton", make((35, 8), (5,), "y gate"), rows=rows, tanh=True)


def test_tanh_is_exact_everywhere() -> None:
    """Near zero (gates start there), across the seam of the two formulas, saturated, infinite."""
    gate = torch.cat([torch.logspace(-30, 2, 4001), torch.linspace(0.6, 0.7, 1000)])
    gate = torch.cat([gate, -gate, torch.tensor([0.0, torch.inf, -torch.inf])])
    x, y = torch.zeros_like(gate)[None], torch.ones_like(gate)[None]
    exact = torch.tanh(gate.double())
    for backend in BACKENDS:
        with use_backend(backend):
            got = gate_residual(x, y, gate, per="all", tanh=True)[0]
            unset = gate_residual(x, y, torch.full_like(gate, torch.nan), per="all", tanh=True)
        assert torch.isnan(unset).all()
        ulp = torch.finfo(torch.float32).eps * exact.abs() + 1e-44
        assert ((got.double() - exact).abs() <= 2 * ulp).all(), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", ["torch", "diffusers_rms", ("tanh", "table")])
def test_laws_keep_the_2x_rule(backend: str, law: Any) -> None:
    arguments = make((2, length(backend, 33), 72), (2,), "y gate gate_table weight")
    compare(gate_residual, backend, arguments, (torch.float16,) * 2, law=law, **SANDWICH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_laws_are_bit_equal_to_their_expression(dtype: torch.dtype) -> None:
    width = 1152
    x, y = randn(64, width, dtype=dtype, seed=1), randn(64, width, dtype=dtype, seed=2)
    gate, table, weight = (randn(width, dtype=dtype, seed=i) for i in range(3, 6))

    def ours(law: str, gate: Tensor = gate, **options: Any) -> Tensor:
        with use_backend("native"):
            return gate_residual(x, y, gate, per="all", law=law, **options)

    gated = gate * y  # DiT
    assert_law(ours("torch"), x + gated, ours("fp32_once"), gated)
    gated = (gate + table) * y  # PixArt
    once = ours("fp32_once", gate_table=table)
    assert_law(ours("torch", gate_table=table), x + gated, once, gated)
    # Z-Image and Lumina2 with torch's RMSNorm, and with diffusers', which rounds before the weight
    options: dict[str, Any] = {"norm": "rms", "weight": weight, "tanh": True}
    once = ours("fp32_once", **options)
    gated = torch.tanh(gate) * F.rms_norm(y, (width,), weight, 1e-6)
    assert_law(ours("torch", **options), x + gated, once, gated)
    xhat = y.float() * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-6)
    gated = torch.tanh(gate) * (xhat.to(dtype) * weight)
    assert_law(ours("diffusers_rms", **options), x + gated, once, gated)


def test_mochi_is_fp32_once() -> None:
    """Mochi computes the sandwich in fp32 and rounds once."""
    x, y, gate = (randn(32, 240, dtype=torch.bfloat16, seed=i) for i in range(3))
    normed = y.float() * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-6)
    eager = (x.float() + normed * torch.tanh(gate[:1].float())).to(torch.bfloat16)
    with use_backend("native"):
        got = gate_residual(x, y, gate[0], per="all", **SANDWICH)
    assert (got == eager).float().mean() >= 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend: str) -> None:
    base = randn(3, 9, 2 * 48 + 1, seed=3)
    x = base[:, 1:8, 1:49].requires_grad_()  # offset 1, rows of 97
    y = randn(7, 3, 50, seed=4).transpose(0, 1)[..., 2:].requires_grad_()
    gate = randn(3, 6 * 48, seed=4).chunk(6, -1)[2]
    for upstream in (torch.ones(()).expand(3, 7, 48), randn(48, seed=8).expand(3, 7, 48)):
        results = []
        for name in ("reference", backend):
            with use_backend(name):
                results.append(
                    torch.autograd.grad(gate_residual(x, y, gate, **SANDWICH), (x, y), upstream)
                )
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_bands(backend: str) -> None:
    """Kernels read nothing beside a view and write nothing outside their output."""
    frame = torch.full((5, 72), float("nan"))
    frame[1:4, 16:56] = randn(3, 40)
    view = frame[1:4, 16:56]
    with use_backend(backend):
        for options in ({}, SANDWICH):
            out = gate_residual(view, view, randn(1, 40, seed=2), **options)
            assert torch.isfinite(out).all()
    assert torch.isnan(frame[0]).all() and torch.isnan(frame[1:4, :16]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_modulation_of_half_precision(backend: str) -> None:
    x, y = (randn(2, 9, 64, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(2))
    arguments = {"x": x, "y": y, "gate": leaf(2, 64, seed=1), "gate_table": leaf(64, seed=2)}
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            results.append(run(gate_residual, arguments, [randn(2, 9, 64, seed=3)], tanh=True))
    for key, expected in results[0].items():
        got = results[1][key]
        assert got.dtype == expected.dtype, key
        tolerance = 2e-2 if expected.dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    full = make((2, length(backend, 40), 24), (2,), "y gate gate_table weight")
    upstream = [randn(*full["x"].shape, seed=9)]
    with use_backend(backend):
        everything = run(gate_residual, full, upstream, **SANDWICH)
        for keep in (*((name,) for name in full), ("x", "weight"), ("y", "gate_table")):
            some = {k: v.detach().requires_grad_(k in keep) for k, v in full.items()}
            got = run(gate_residual, some, upstream, **SANDWICH)
            assert got.keys() == {"out0", *(f"d{k}" for k in keep)}
            assert all(torch.equal(got[k], everything[k]) for k in got)


def test_gradient_of_the_stream_is_no_copy() -> None:
    x, y, gate = leaf(2, 5, 8, seed=1), leaf(2, 5, 8, seed=2), leaf(2, 8, seed=3)
    upstream = randn(2, 5, 8, seed=4)
    with use_backend("native"):
        dx, _ = torch.autograd.grad(gate_residual(x, y, gate), (x, y), upstream)
        assert dx.data_ptr() == upstream.data_ptr()
        dx, dy = torch.autograd.grad(gate_residual(x, y), (x, y), upstream)
        assert dx.data_ptr() == dy.data_ptr() == upstream.data_ptr()


def test_frozen_gate_keeps_no_branch() -> None:
    """A frozen gate (LoRA) needs only itself for the backward: y is not kept."""
    kept: list[Tensor] = []
    x, y, gate = leaf(2, 50, 8, seed=1), leaf(2, 50, 8, seed=2), randn(2, 8, seed=3)
    pack = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    )
    with use_backend("native"), pack:
        gate_residual(x, y, gate)
        assert max(t.numel() for t in kept) == gate.numel()
        gate_residual(x, y, gate.requires_grad_())
        assert max(t.numel() for t in kept) == y.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_packed_equals_alone(backend: str) -> None:
    lengths = (20, 1, 49) if backend == "native" else (6, 1, 18)
    rows = RowMap.from_index(torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)), 3)
    arguments = make((sum(lengths), 72), (3,), "y gate")
    upstream = randn(sum(lengths), 72, seed=4)
    with use_backend(backend):
        first, *others = (
            run(gate_residual, arguments, [upstream], rows=rows, **SANDWICH) for _ in range(3)
        )
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first)
        start = 0
        for row, count in enumerate(lengths):
            part = slice(start, start + count)
            alone = {
                k: v.detach()[part if k in "xy" else slice(row, row + 1)].requires_grad_()
                for k, v in arguments.items()
            }
            single = run(gate_residual, alone, [upstream[part]], **SANDWICH)
            assert torch.equal(single["out0"], first["out0"][part])
            assert torch.equal(single["dy"], first["dy"][part])
            torch.testing.assert_close(
                single["dgate"][0], first["dgate"][row], atol=1e-4, rtol=1e-5
            )
            start += count


def test_threads_do_not_change_bits() -> None:
    arguments = make((4, 150, 96), (4,), "y gate weight")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(
                    run(gate_residual, arguments, [randn(4, 150, 96, seed=4)], norm="layer")
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def test_large_outputs_past_the_cache() -> None:
    """Above 8 MiB the CPU kernels store past the cache, if rows are aligned for it."""
    for width in (1024, 1001):
        arguments = make((2100, width), (1,), "y gate")
        compare(gate_residual, "native", arguments)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(1, 150),
    norm=st.sampled_from([None, "rms", "layer"]),
    tanh=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int, length: int, width: int, norm: str | None, tanh: bool, seed: int
) -> None:
    index = torch.randint(0, 4, (batch * length,), generator=torch.Generator().manual_seed(seed))
    # a variance near zero makes every implementation inexact: keep eps well above rounding
    compare(
        gate_residual,
        "native",
        make((batch, length, width), (4,), "y gate"),
        rows=RowMap.from_index(index, 4),
        norm=norm,
        tanh=tanh,
        eps=1e-2,
    )


def test_gradcheck_of_the_reference() -> None:
    double = [leaf(*s, seed=i).double() for i, s in enumerate([(2, 3, 5)] * 2 + [(2, 5), (5,)])]
    arguments = tuple(t.detach().requires_grad_() for t in double)

    def call(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gate_residual(x, y, gate, tanh=True, norm="layer", weight=weight)

    assert torch.autograd.gradcheck(call, arguments)


def test_empty_input() -> None:
    x, y = torch.zeros(2, 0, 8, requires_grad=True), torch.zeros(2, 0, 8)
    gate = torch.zeros(2, 8, requires_grad=True)
    out = gate_residual(x, y, gate)
    assert out.shape == (2, 0, 8)
    assert torch.equal(torch.autograd.grad(out.sum(), gate)[0], torch.zeros(2, 8))


# --- registration -------------------------------------------------------------------------------


def raw_arguments(norm: int, stream: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, y, gate = randn(2, 5, 8, dtype=stream), randn(2, 5, 8, seed=1), randn(2, 8, seed=2)
    weight = randn(8, seed=3) if norm else None
    return (x, y, gate, None, weight, None, 5, False, norm, 1e-6, 0)


@pytest.mark.parametrize("norm", [0, 1, 2])
def test_opcheck(norm: int) -> None:
    ops = torch.ops.sora_kernels
    arguments = raw_arguments(norm)
    torch.library.opcheck(ops.gate_residual_fwd.default, arguments)
    out, mean, rstd = ops.gate_residual_fwd(*arguments)
    _, y, gate, table, weight = arguments[:5]
    for needs in (0b111, 0b010, 0b001):
        backward = (
            torch.randn_like(out), y, mean, rstd, gate, table, weight, None, None, None, 5, False,
            norm, 0, torch.float32, needs,
        )  # fmt: skip
        torch.library.opcheck(ops.gate_residual_bwd.default, backward)


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    arguments = raw_arguments(0)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.gate_residual_fwd(arguments[0].requires_grad_(), *arguments[1:])


def test_fullgraph_and_dynamic_length() -> None:
    """No graph break, and no new compilation for a new length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, y: Tensor, gate: Tensor, rows: RowMap) -> Tensor:
        return gate_residual(x * 2, y * 2, gate, rows=rows, **SANDWICH).sin()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (50, 61, 97, 40):
        rows = RowMap.from_index(torch.arange(tokens) * 3 // tokens, 3)
        arguments = tuple(leaf(n, 16, seed=n) for n in (tokens, tokens, 3))
        upstream = randn(tokens, 16, seed=5)
        got = torch.autograd.grad(compiled(*arguments, rows), arguments, upstream)
        want = torch.autograd.grad(block(*arguments, rows), arguments, upstream)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four lengths"


def test_meta_device() -> None:
    x, gate = torch.empty(2, 5, 8, device="meta"), torch.empty(2, 8, device="meta")
    out = gate_residual(x, x, gate)
    assert out.device.type == "meta" and out.shape == (2, 5, 8)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x: expected shape"),
        ({"y": torch.zeros(2, 5, 7)}, ValueError, r"y: expected shape \(2, 5, 8\)"),
        ({"y": torch.zeros(2, 5, 8).double()}, TypeError, "y: expected torch.float32 or a half"),
        ({"y": None}, TypeError, "y: expected a Tensor"),
        ({"norm": "batch"}, ValueError, "norm: expected"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"per": "pixel"}, ValueError, "per: expected one of"),
        ({"gate": torch.zeros(3, 8)}, ValueError, r"gate: expected shape \(2, 8\), got \(3, 8\)"),
        ({"weight": torch.zeros(8)}, ValueError, "weight: expected None without norm"),
        ({"weight": torch.zeros(7), "norm": "rms"}, ValueError, r"weight: expected shape \(8,\)"),
        ({"gate_table": torch.zeros(8)}, ValueError, "gate_table: expected gate"),
        ({"tanh": True}, ValueError, "tanh: expected gate"),
        ({"rows": RowMap.uniform(3, 5)}, ValueError, "rows: expected a map of 10 tokens, got 15"),
        ({"law": "wrong"}, ValueError, "law: expected one of"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(2, 5, 8)
    with pytest.raises(error, match=message):
        gate_residual(**{"x": zeros, "y": zeros, **arguments})
