"""gate_residual_norm_modulate against its fp64 definition, forward and its one-pass backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sora_kernels import RowMap, gate_residual, norm_modulate, use_backend
from sora_kernels import gate_residual_norm_modulate as fused
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

USUAL = "y gate shift scale"
EVERYTHING = "y y2 gate gate2 shift scale weight bias gate_table shift_table scale_table"
BOTH = (True, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_dtypes_and_norms(backend: str, dtypes: Any, norm: str) -> None:
    arguments = make((3, 7, 100), (3,), USUAL + " weight bias")
    compare(fused, backend, arguments, dtypes, used=BOTH, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 63, 72, 128, 1152, 3072, 5120])
def test_widths(backend: str, width: int) -> None:
    """5120 is cut into slices in the Triton backward."""
    compare(fused, backend, make((2, 3, width), (2,), USUAL), used=BOTH, eps=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "names",
    [
        "y",
        "y weight bias",
        "y gate",
        "y shift",
        "y scale scale_table",
        "y gate gate_table shift shift_table",
        "y y2 gate gate2 shift scale",
        "y y2 gate scale",
        EVERYTHING,
    ],
)
def test_optional_parts(backend: str, names: str) -> None:
    arguments = make((2, length(backend, 35), 40), (2,), names)
    compare(fused, backend, arguments, used=BOTH, norm="rms")
    compare(fused, backend, arguments, (torch.float32, torch.bfloat16), used=BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=str)
def test_one_output_unused(backend: str, used: tuple[bool, ...]) -> None:
    for names in (USUAL, "y", EVERYTHING):
        compare(fused, backend, make((2, 9, 40), (2,), names), used=used)


@pytest.mark.parametrize(("backend", "per", "shape", "lead"), BY_BACKEND)
def test_granularities(
    backend: str, per: str, shape: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    compare(fused, backend, make(shape, lead, USUAL), used=BOTH, per=per)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_rows(backend: str, pattern: str) -> None:
    # more than three blocks of the CPU kernel's backward, more than one of Triton's forward
    tokens = length(backend, 101, 35)
    count = tokens if pattern == "a row a token" else 6
    rows = map_of(pattern, tokens, count)
    compare(fused, backend, make((tokens, 40), (count,), USUAL), used=BOTH, rows=rows)


def test_rows_with_long_blocks_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few programs that each of the backward sums several tokens."""
    monkeypatch.setattr(_config, "MAX_PROGRAMS", 10)  # blocks of 4 tokens, rows of 7
    rows = map_of("runs", 35, 5)
    compare(fused, "triton", make((35, 8), (5,), USUAL), used=BOTH, rows=rows, eps=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", ["torch", "diffusers_rms", ("residual", "one_plus")])
def test_laws_keep_the_2x_rule(backend: str, law: Any) -> None:
    arguments = make((2, length(backend, 17), 72), (2,), EVERYTHING)
    compare(fused, backend, arguments, (torch.float16,) * 2, used=BOTH, law=law)


@pytest.mark.parametrize("names", ["y", "y gate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_of_the_unrounded_sum(names: str, dtype: torch.dtype) -> None:
    """Half-precision streams under fp32_once: the norm read the sum before it was rounded.

    The gradient of an fp32 scale must not see the stored residual's rounding; with a frozen
    modulation the backward may read that residual, and dx keeps the 3x rule all the same.
    """
    arguments = make((2, 65, 72), (2,), names)
    compare(fused, "native", arguments, (dtype, dtype), used=BOTH)
    scale = {"scale": leaf(2, 72, seed=9)}
    half = {k: v.detach().to(dtype).requires_grad_() for k, v in arguments.items()} | scale
    upstream: list[Tensor | None] = [None, randn(2, 65, 72, seed=3).to(dtype)]
    results = []
    for backend in ("reference", "native"):
        with use_backend(backend):
            results.append(run(fused, half, upstream)["dscale"])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_laws_are_bit_equal_to_their_expression(dtype: torch.dtype) -> None:
    width = 1152
    x, y = randn(64, width, dtype=dtype, seed=1), randn(64, width, dtype=dtype, seed=2)
    gate, shift, scale, weight, bias = (randn(width, dtype=dtype, seed=i) for i in range(3, 8))

    def ours(law: str, **options: Any) -> tuple[Tensor, Tensor]:
        with use_backend("native"):
            return fused(x, y, gate, shift, scale, per="all", law=law, **options)

    residual = x + gate * y  # SD3, Flux, Hunyuan: every operator rounds
    product = F.layer_norm(residual, (width,), weight, bias, 1e-6) * (1 + scale)
    got = ours("torch", weight=weight, bias=bias)
    once = ours("fp32_once", weight=weight, bias=bias)
    assert_law(got[0], residual, once[0], gate * y)
    assert_law(got[1], product + shift, once[1], product, different=0.9)
    # LTX and Z-Image with diffusers' RMSNorm, which rounds before the weight
    wide = residual.float()
    xhat = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    product = xhat * weight * (1 + scale)
    got = ours("diffusers_rms", weight=weight, norm="rms")
    once = ours("fp32_once", weight=weight, norm="rms")
    assert_law(got[1], product + shift, once[1], product, different=0.9)
    # SD3.5's two gated branches, each added in the model's dtype
    gate2 = randn(width, dtype=dtype, seed=9)
    two = x + gate * y + gate2 * y
    got = ours("torch", y2=y, gate2=gate2)
    assert_law(got[0], two, ours("fp32_once", y2=y, gate2=gate2)[0], residual, gate2 * y)


def test_wan_is_fp32_once_on_an_fp32_stream() -> None:
    x, y = randn(64, 240, seed=1), randn(64, 240, dtype=torch.bfloat16, seed=2)
    gate, shift, scale = (randn(240, seed=i) for i in range(3, 6))
    residual = x + y.float() * gate
    eager = F.layer_norm(residual, (240,), eps=1e-6) * (1 + scale) + shift
    with use_backend("native"):
        got = fused(x, y, gate, shift, scale, per="all")
    assert got[0].dtype is torch.float32 and got[1].dtype is torch.bfloat16
    assert torch.equal(got[0], residual)
    assert (got[1] == eager.to(torch.bfloat16)).float().mean() >= 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_two_ops_one_after_the_other(backend: str) -> None:
    """With the residual rounded before the norm, fusing is only a matter of speed."""
    a = {k: v.half() for k, v in make((2, 9, 72), (2,), USUAL).items()}
    law = ("residual",)
    with use_backend(backend), torch.no_grad():
        residual, normed = fused(**a, law=law)
        alone = gate_residual(a["x"], a["y"], a["gate"], law=law)
        assert torch.equal(residual, alone)
        assert torch.equal(normed, norm_modulate(alone, a["shift"], a["scale"], law=law))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend: str) -> None:
    base = randn(3, 9, 2 * 48 + 1, seed=3)
    x = base[:, 1:8, 1:49].requires_grad_()  # offset 1, rows of 97
    y = randn(7, 3, 50, seed=4).transpose(0, 1)[..., 2:].requires_grad_()
    gate, shift, scale = randn(3, 6 * 48, seed=4).chunk(6, -1)[2:5]
    one, row = torch.ones(()).expand(3, 7, 48), randn(48, seed=8).expand(3, 7, 48)
    for upstream in ((one, row), (row, row)):
        results = []
        for name in ("reference", backend):
            with use_backend(name):
                results.append(
                    torch.autograd.grad(fused(x, y, gate, shift, scale), (x, y), upstream)
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
        for out in fused(view, view, randn(1, 40, seed=2)):
            assert torch.isfinite(out).all()
    assert torch.isnan(frame[0]).all() and torch.isnan(frame[1:4, :16]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    full = make((2, length(backend, 20, 3), 24), (2,), EVERYTHING)
    upstream: list[Tensor | None] = [randn(*full["x"].shape, seed=seed) for seed in (9, 8)]
    with use_backend(backend):
        everything = run(fused, full, upstream)
        for keep in (*((name,) for name in full), ("x", "weight"), ("y", "gate_table")):
            some = {k: v.detach().requires_grad_(k in keep) for k, v in full.items()}
            got = run(fused, some, upstream)
            assert got.keys() == {"out0", "out1", *(f"d{k}" for k in keep)}
            for key, value in got.items():
                # the residual may have been read instead of summed again
                torch.testing.assert_close(value, everything[key], atol=1e-5, rtol=1e-5, msg=key)


def test_what_is_kept_for_the_backward() -> None:
    """Frozen modulation (LoRA): one tensor of the stream's size. A gate's gradient: x and y."""
    x, y = leaf(2, 50, 8, seed=1), leaf(2, 50, 8, seed=2)
    gate, shift, scale = (randn(2, 8, seed=i) for i in range(3, 6))
    kept: list[Tensor] = []
    pack = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    )
    with use_backend("native"), pack:
        fused(x, y, gate, shift, scale)
        assert sum(t.numel() == x.numel() for t in kept) == 1
        kept.clear()
        fused(x, y, gate.requires_grad_(), shift, scale)
        assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {
            x.data_ptr(),
            y.data_ptr(),
        }


def test_ungated_branch_shares_the_gradient_of_the_stream() -> None:
    x, y = leaf(2, 5, 8, seed=1), leaf(2, 5, 8, seed=2)
    with use_backend("native"):
        out = fused(x, y)
        dx, dy = torch.autograd.grad(out, (x, y), [randn(2, 5, 8, seed=i) for i in range(2)])
    assert dx.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_packed_equals_alone(backend: str) -> None:
    lengths = (20, 1, 49) if backend == "native" else (6, 1, 18)
    rows = RowMap.from_index(torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)), 3)
    arguments = make((sum(lengths), 72), (3,), USUAL)
    upstream = [randn(sum(lengths), 72, seed=seed) for seed in (4, 5)]
    with use_backend(backend):
        first, *others = (run(fused, arguments, list(upstream), rows=rows) for _ in range(3))
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first)
        start = 0
        for row, count in enumerate(lengths):
            part = slice(start, start + count)
            alone = {
                k: v.detach()[part if k in "xy" else slice(row, row + 1)].requires_grad_()
                for k, v in arguments.items()
            }
            single = run(fused, alone, [u[part] for u in upstream])
            for key in ("out0", "out1", "dx", "dy"):
                assert torch.equal(single[key], first[key][part]), key
            for key in ("dgate", "dshift", "dscale"):
                torch.testing.assert_close(single[key][0], first[key][row], atol=1e-4, rtol=1e-5)
            start += count


def test_threads_do_not_change_bits() -> None:
    arguments = make((4, 150, 96), (4,), EVERYTHING)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                upstream = [randn(4, 150, 96, seed=i) for i in (4, 5)]
                results.append(run(fused, arguments, list(upstream)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def test_large_outputs_past_the_cache() -> None:
    """Above 8 MiB the CPU kernels store past the cache, if rows are aligned for it."""
    for width in (1024, 1001):
        compare(fused, "native", make((2100, width), (1,), USUAL), used=BOTH)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(1, 150),
    norm=st.sampled_from(["rms", "layer"]),
    names=st.sampled_from([USUAL, "y gate weight bias", "y y2 gate gate2 scale"]),
    seed=st.integers(0, 99),
)
def test_any_shape(batch: int, length: int, width: int, norm: str, names: str, seed: int) -> None:
    index = torch.randint(0, 4, (batch * length,), generator=torch.Generator().manual_seed(seed))
    rows = RowMap.from_index(index, 4)
    # a variance near zero makes every implementation inexact: keep eps well above rounding
    arguments = make((batch, length, width), (4,), names)
    compare(fused, "native", arguments, used=BOTH, rows=rows, norm=norm, eps=1e-2)


def test_gradcheck_of_the_reference() -> None:
    shapes = ((2, 3, 5), (2, 3, 5), (2, 5), (2, 5), (2, 5))
    double = tuple(leaf(*s, seed=i).detach().double() for i, s in enumerate(shapes))
    assert torch.autograd.gradcheck(fused, tuple(t.requires_grad_() for t in double))


def test_empty_input() -> None:
    x, scale = torch.zeros(2, 0, 8, requires_grad=True), torch.zeros(2, 8, requires_grad=True)
    residual, normed = fused(x, x, scale=scale)
    assert residual.shape == normed.shape == (2, 0, 8)
    assert torch.equal(torch.autograd.grad(normed.sum(), scale)[0], torch.zeros(2, 8))


# --- registration -------------------------------------------------------------------------------


def raw_arguments(two: bool, rms: bool) -> tuple[Any, ...]:
    x, y = randn(2, 5, 8), randn(2, 5, 8, seed=1)
    gate, shift, scale = (randn(2, 8, seed=i) for i in range(2, 5))
    second = (randn(2, 5, 8, seed=5), randn(2, 8, seed=6)) if two else (None, None)
    mods = (gate, second[1], None, None, shift, scale, None, None, None)
    return (x, y, second[0], *mods, None, 5, 1e-6, rms, 0, torch.float32)


@pytest.mark.parametrize(("two", "rms"), [(False, False), (True, True)])
def test_opcheck(two: bool, rms: bool) -> None:
    ops = torch.ops.sora_kernels
    arguments = raw_arguments(two, rms)
    torch.library.opcheck(ops.gate_residual_norm_modulate_fwd.default, arguments)
    residual, normed, mean, rstd = ops.gate_residual_norm_modulate_fwd(*arguments)
    x, y, y2, *mods = arguments[:12]
    for needs in (0b110011111 if two else 0b110001011, 0b000000001):
        backward = (
            torch.randn_like(residual), torch.randn_like(normed), x, y, y2, mean, rstd, *mods,
            None, None, None, 5, rms, 0, torch.float32, needs,
        )  # fmt: skip
        torch.library.opcheck(ops.gate_residual_norm_modulate_bwd.default, backward)


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    x, *rest = raw_arguments(False, False)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.gate_residual_norm_modulate_fwd(x.requires_grad_(), *rest)


def test_fullgraph_and_dynamic_length() -> None:
    """No graph break, and no new compilation for a new length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, y: Tensor, g: Tensor, s: Tensor, c: Tensor, rows: RowMap) -> Tensor:
        residual, normed = fused(x * 2, y, g, s, c, rows=rows)
        return residual.sin() + normed.cos()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (50, 61, 97, 40):
        rows = RowMap.from_index(torch.arange(tokens) * 3 // tokens, 3)
        arguments = tuple(leaf(n, 16, seed=n) for n in (tokens, tokens, 3, 3, 3))
        upstream = randn(tokens, 16, seed=5)
        got = torch.autograd.grad(compiled(*arguments, rows), arguments, upstream)
        want = torch.autograd.grad(block(*arguments, rows), arguments, upstream)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four lengths"


def test_meta_device() -> None:
    x = torch.empty(2, 5, 8, device="meta")
    residual, normed = fused(x, x)
    assert residual.device.type == normed.device.type == "meta" and normed.shape == (2, 5, 8)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x: expected shape"),
        ({"y": torch.zeros(2, 5, 7)}, ValueError, r"y: expected shape \(2, 5, 8\)"),
        ({"y": torch.zeros(2, 5, 8).double()}, TypeError, "y: expected torch.float32 or a half"),
        ({"y2": torch.zeros(2, 5, 8).half()}, TypeError, "y2: expected torch.float32"),
        ({"gate2": torch.zeros(2, 8)}, ValueError, "gate2: expected y2"),
        ({"norm": "batch"}, ValueError, "norm: expected"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"per": "pixel"}, ValueError, "per: expected one of"),
        ({"scale": torch.zeros(3, 8)}, ValueError, r"scale: expected shape \(2, 8\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \(8,\)"),
        ({"shift_table": torch.zeros(8)}, ValueError, "shift_table: expected shift"),
        ({"rows": RowMap.uniform(3, 5)}, ValueError, "rows: expected a map of 10 tokens, got 15"),
        ({"law": "wrong"}, ValueError, "law: expected one of"),
        ({"out_dtype": torch.float16}, ValueError, "out_dtype: expected torch.float32"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(2, 5, 8)
    with pytest.raises(error, match=message):
        fused(**{"x": zeros, "y": zeros, **arguments})
