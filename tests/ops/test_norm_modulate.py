"""norm_modulate against its fp64 definition: every implementation, convention, layout, gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import RowMap, norm_modulate, use_backend
from sora_kernels.laws import PRESETS, Point
from sora_kernels.ops import _config
from tests.helpers import WIDTHS, check, poisoned, randn

BACKENDS = ("native", "triton")
NAMES = (
    "weight", "bias", "shift", "scale", "shift_table", "scale_table", "shift2", "scale2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens per program of the Triton backward, as on a GPU with many more tokens."""
    monkeypatch.setattr(_config, "MAX_PROGRAMS", 4)


def extra_ulp(backend: str, dtype: torch.dtype) -> float:
    """The Triton interpreter truncates when it stores bf16; compiled code rounds."""
    return 1.0 if backend == "triton" and dtype is torch.bfloat16 else 0.0


def to(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.detach().to(dtype).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in tensors.items()
    }


def run(arguments: dict[str, Any], upstream: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients of one call, by name."""
    y = norm_modulate(**arguments, **options)
    outputs = list(y) if isinstance(y, tuple) else [y]
    wanted = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)],
    )
    results = {f"y{i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def compare(
    backend: str, arguments: dict[str, Any], dtype: torch.dtype, outputs: int = 1, **options: Any
) -> None:
    """The 2x rule for outputs, the 3x rule for gradients, with random upstream gradients."""
    arguments = to(arguments, dtype)
    upstream = [randn(*arguments["x"].shape, dtype=dtype, seed=77 + i) for i in range(outputs)]
    with use_backend("reference"):
        exact = run(to(arguments, torch.float64), [u.double() for u in upstream], **options)
        lowp = run(arguments, upstream, **options)
    with use_backend(backend), poisoned():
        got = run(arguments, upstream, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == dtype, name
        check(
            value,
            exact[name],
            lowp[name],
            grad=name.startswith("d"),
            extra_ulp=extra_ulp(backend, dtype),
            name=f"{backend} {name}",
        )


def leaf(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def make(
    shape: tuple[int, ...], lead: tuple[int, ...], names: tuple[str, ...] = ("shift", "scale")
) -> dict[str, Any]:
    """x and the named modulations as chunks of one projection, as models produce them."""
    width = shape[-1]
    projected = randn(*lead, 6 * width, seed=5)
    arguments: dict[str, Any] = {"x": leaf(*shape, seed=1)}
    for position, name in enumerate(NAMES):
        if name in names:
            if name in ("weight", "bias") or name.endswith("_table"):
                arguments[name] = leaf(width, seed=position)
            else:
                chunk = position % 6 * width
                arguments[name] = projected[..., chunk : chunk + width].requires_grad_()
    return arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dtypes_and_norms(backend: str, dtype: torch.dtype, norm: str) -> None:
    names = ("weight", "bias", "shift", "scale")
    compare(backend, make((3, 7, 100), (3,), names), dtype, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [*WIDTHS, 1536, 3072, 5120])
def test_widths(backend: str, width: int) -> None:
    compare(backend, make((2, 3, width), (2,)), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("shift",),
        ("scale",),
        ("weight",),
        ("weight", "bias"),
        ("shift", "scale", "shift_table", "scale_table"),
        ("scale", "scale_table"),
        ("shift", "scale", "shift2", "scale2"),
        ("weight", "bias", "scale", "shift2"),
    ],
    ids="-".join,
)
def test_optional_parts(backend: str, names: tuple[str, ...]) -> None:
    outputs = 2 if "shift2" in names else 1
    for norm in ("layer", "rms"):
        compare(backend, make((2, 7, 40), (2,), names), torch.float32, outputs, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("per", "shape", "lead"),
    [
        ("all", (2, 35, 24), ()),
        ("all", (70, 24), ()),
        ("sample", (3, 33, 24), (3,)),
        ("sample", (70, 24), (1,)),
        ("sample", (2, 3, 11, 24), (2,)),
        ("frame", (2, 36, 24), (2, 4)),
        ("token", (2, 5, 24), (2, 5)),
        ("token", (65, 24), (65,)),
    ],
)
def test_granularities(
    backend: str, per: str, shape: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    compare(backend, make(shape, lead), torch.float32, per=per)


ROW_PATTERNS = {
    "runs": lambda n, r: torch.arange(n) * r // n,
    "shuffled": lambda n, r: torch.randint(0, r, (n,), generator=torch.Generator().manual_seed(3)),
    "empty rows": lambda n, r: (torch.arange(n) * r // n) // 2 * 2,
    "one long row": lambda n, r: torch.full((n,), r // 2),
    "a row a token": lambda n, r: torch.arange(n).flip(0) % r,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_rows(backend: str, pattern: str) -> None:
    # both span several blocks of the backward
    tokens = 131 if backend == "native" else 45
    count = tokens if pattern == "a row a token" else 6
    rows = RowMap.from_index(ROW_PATTERNS[pattern](tokens, count), count)
    compare(backend, make((tokens, 40), (count,)), torch.float32, rows=rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", ["torch", "diffusers_rms", ("one_plus", "table")])
def test_laws_keep_the_2x_rule(backend: str, law: Any) -> None:
    names = ("weight", "bias", "shift", "scale", "shift_table", "scale_table")
    compare(backend, make((2, 9, 72), (2,), names), torch.float16, law=law)


def eager_torch(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What the law "torch" stands for."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6) * (1 + scale) + shift


def eager_diffusers_rms(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    """What the law "diffusers_rms" stands for: diffusers' own RMSNorm, modulated."""
    xhat = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return (xhat.to(x.dtype) * weight) * (1 + scale) + shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("law", ["torch", "diffusers_rms"])
def test_laws_are_bit_equal_to_their_expression(law: str, dtype: torch.dtype) -> None:
    """At least 99.9% of outputs bit-equal, the rest within 1 ulp of the largest intermediate."""
    x, width = randn(64, 1152, dtype=dtype, seed=1), 1152
    weight, bias, shift, scale = (randn(width, dtype=dtype, seed=i) for i in range(2, 6))
    rms = law == "diffusers_rms"
    eager = (eager_diffusers_rms if rms else eager_torch)(x, weight, bias, shift, scale)
    with use_backend("native"):
        got = norm_modulate(
            x, shift, scale, weight=weight, bias=None if rms else bias,
            norm="rms" if rms else "layer", per="all", law=law,
        )  # fmt: skip
        once = norm_modulate(
            x, shift, scale, weight=weight, bias=None if rms else bias,
            norm="rms" if rms else "layer", per="all",
        )  # fmt: skip
    equal = (got == eager).float().mean().item()
    assert equal >= 0.999, f"{equal:.4%} bit-equal"
    largest = (eager.abs() + shift.abs()).max().double()
    spacing = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(dtype).eps
    assert (got.double() - eager.double()).abs().max() <= spacing
    assert (once == eager).float().mean() < 0.95, "the law must make a difference"


def test_law_masks_match_the_header() -> None:
    import re
    from pathlib import Path

    header = (Path(__file__).parents[2] / "csrc/common/law.h").read_text()
    found = {name.upper(): int(v) for name, v in re.findall(r"k(\w+) = (\d+)", header)}
    expected = {str(p.name).replace("_", ""): p.value for p in Point}
    assert found == expected
    assert PRESETS["fp32_once"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend: str) -> None:
    base = randn(3, 9, 2 * 48 + 1, seed=3)
    x = base[:, 1:8, 1 : 1 + 48].requires_grad_()  # offset 1, rows of 97
    shift, scale = randn(3, 6 * 48, seed=4).chunk(6, -1)[2:4]
    with use_backend("reference"):
        expected = torch.autograd.grad(norm_modulate(x, shift, scale).sum(), x)[0]
    with use_backend(backend):
        y = norm_modulate(x, shift, scale)
        got = torch.autograd.grad(y.sum(), x)[0]  # upstream gradient of stride 0
        rowwise = torch.autograd.grad(
            norm_modulate(x, shift, scale), x, randn(48, seed=8).expand(3, 7, 48)
        )[0]
    with use_backend("reference"):
        expected_rowwise = torch.autograd.grad(
            norm_modulate(x, shift, scale), x, randn(48, seed=8).expand(3, 7, 48)
        )[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rowwise, expected_rowwise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_bands(backend: str) -> None:
    """Kernels read nothing beside a view and write nothing outside their output."""
    frame = torch.full((5, 40 + 32), float("nan"))
    frame[1:4, 16:56] = randn(3, 40)
    x = frame[1:4, 16:56]
    with use_backend(backend):
        y = norm_modulate(x, randn(1, 40, seed=2), randn(1, 40, seed=3))
    assert torch.isfinite(y).all()
    assert torch.isnan(frame[0]).all() and torch.isnan(frame[1:4, :16]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend: str) -> None:
    """bf16 activations with fp32 modulation (Wan), and an fp32 stream giving bf16 branches."""
    shift, scale = leaf(2, 64, seed=1), leaf(2, 64, seed=2)
    for x_dtype, out_dtype in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        x = randn(2, 9, 64, dtype=x_dtype, seed=4).requires_grad_()
        upstream = [randn(2, 9, 64, dtype=torch.bfloat16, seed=9)]
        results = {}
        for name in ("reference", backend):
            with use_backend(name):
                results[name] = run(
                    {"x": x, "shift": shift, "scale": scale}, upstream, out_dtype=out_dtype
                )
        for key, value in results[backend].items():
            expected = results["reference"][key]
            assert value.dtype == expected.dtype, key
            tolerance = 2e-2 if expected.dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(value, expected, atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    names = ("weight", "bias", "shift", "scale", "shift_table", "scale_table")
    full = make((2, 6, 24), (2,), names)
    upstream = [randn(2, 6, 24, seed=9)]
    with use_backend(backend):
        everything = run(full, upstream)
        for wanted in itertools.chain(full, [("x", "scale"), ("shift_table",)]):
            keep = (wanted,) if isinstance(wanted, str) else wanted
            some = {k: v.detach().requires_grad_(k in keep) for k, v in full.items()}
            got = run(some, upstream)
            assert {k for k in got if k != "y0"} == {f"d{k}" for k in keep}
            for key, value in got.items():
                assert torch.equal(value, everything[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_packed_equals_alone(backend: str) -> None:
    x = randn(90, 72, seed=1).requires_grad_()
    index = torch.tensor([0] * 20 + [1] * 1 + [2] * 69)
    rows = RowMap.from_index(index, 3)
    shift, scale = leaf(3, 72, seed=2), leaf(3, 72, seed=3)
    upstream = [randn(90, 72, seed=4)]
    arguments = {"x": x, "shift": shift, "scale": scale}
    with use_backend(backend):
        first, *others = (run(arguments, upstream, rows=rows) for _ in range(3))
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first)
        start = 0
        for row, length in enumerate((20, 1, 69)):
            part = slice(start, start + length)
            alone = {
                "x": x[part].detach().requires_grad_(),
                "shift": shift[row : row + 1].detach().requires_grad_(),
                "scale": scale[row : row + 1].detach().requires_grad_(),
            }
            single = run(alone, [upstream[0][part]])
            assert torch.equal(single["y0"], first["y0"][part])
            assert torch.equal(single["dx"], first["dx"][part])
            torch.testing.assert_close(
                single["dscale"][0], first["dscale"][row], atol=1e-4, rtol=1e-5
            )
            start += length


def test_threads_do_not_change_bits() -> None:
    arguments = make((4, 150, 96), (4,), ("weight", "bias", "shift", "scale"))
    upstream = [randn(4, 150, 96, seed=4)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(run(arguments, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(1, 150),
    norm=st.sampled_from(["layer", "rms"]),
    seed=st.integers(0, 99),
)
def test_any_shape(batch: int, length: int, width: int, norm: str, seed: int) -> None:
    index = torch.randint(0, 4, (batch * length,), generator=torch.Generator().manual_seed(seed))
    arguments = make((batch, length, width), (4,))
    # a variance near zero makes every implementation inexact: keep eps well above rounding
    compare(
        "native", arguments, torch.float32, rows=RowMap.from_index(index, 4), norm=norm, eps=1e-2
    )


def test_gradcheck_of_the_reference() -> None:
    arguments = to(make((2, 3, 5), (2,), ("weight", "bias", "shift", "scale")), torch.float64)
    order = ("x", "shift", "scale", "weight", "bias")

    def call(x: Tensor, s: Tensor, c: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return norm_modulate(x, s, c, weight=w, bias=b)

    assert torch.autograd.gradcheck(call, tuple(arguments[k] for k in order))


def test_empty_input() -> None:
    x = torch.zeros(2, 0, 8, requires_grad=True)
    shift = torch.zeros(2, 8, requires_grad=True)
    y = norm_modulate(x, shift)
    assert y.shape == (2, 0, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), shift)[0], torch.zeros(2, 8))
