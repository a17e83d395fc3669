"""norm_silu against its fp64 definition: every norm, layout and gradient, and the usual modules."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sora_kernels import norm_silu, use_backend
from sora_kernels.ops.norm_silu import config
from tests.helpers import check, far_apart, poisoned, randn

BACKENDS = ("native", "triton")
NORMS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "l2": {"norm": "l2"},
    "group": {"norm": "group", "groups": 3},
    "group per frame": {"norm": "group", "groups": 3, "per_frame": True},
}
LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program of the Triton reductions, as with many more positions."""
    monkeypatch.setattr(config, "_MAX_PROGRAMS", 4)


def make(
    *shape: int, last: bool = False, dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> dict[str, Tensor]:
    x = (randn(*shape, seed=1) + offset).to(dtype)
    return {
        "x": (x.contiguous(memory_format=LAST) if last else x).requires_grad_(),
        "weight": (1 + 0.3 * randn(shape[1], seed=2)).to(dtype).requires_grad_(),
        "bias": randn(shape[1], seed=3).to(dtype).requires_grad_(),
    }


def to(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.detach().to(dtype).requires_grad_() for k, v in tensors.items()}


def run(arguments: dict[str, Tensor], dy: Tensor, **options: Any) -> dict[str, Tensor]:
    y = norm_silu(**arguments, **options)
    wanted = {k: v for k, v in arguments.items() if v.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


def compare(backend: str, arguments: dict[str, Tensor], **options: Any) -> None:
    """The 2x rule for the output, the 3x rule for gradients."""
    x = arguments["x"]
    dy = torch.empty_like(x).copy_(randn(*x.shape, seed=9))
    with use_backend("reference"):
        exact = run(to(arguments, torch.float64), dy.double(), **options)
        lowp = run(arguments, dy, **options)
    with use_backend(backend), poisoned():
        got = run(arguments, dy, **options)
    assert got["y"].stride() == x.stride() or not x.is_contiguous(memory_format=LAST)
    truncated = 1.0 if backend == "triton" and x.dtype is torch.bfloat16 else 0.0
    for name, value in got.items():
        assert value.dtype == x.dtype, name
        # Long sums: the reference may be lucky to the last bit, and the interpreter's sums are
        # NumPy's, which adds the rows of a tile one after another.
        summed = 0.0 if name in ("y", "dx") else 16.0 if backend == "triton" else 4.0
        extra = truncated + (summed if value.dtype is torch.float32 else 0.0)
        check(
            value, exact[name], lowp[name], grad=name != "y", extra_ulp=extra,
            name=f"{backend} {name}",
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes_norms_and_layouts(backend: str, dtype: torch.dtype, last: bool, norm: str) -> None:
    compare(backend, make(2, 12, 3, 9, 10, last=last, dtype=dtype), **NORMS[norm])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("width", [1, 3, 63, 96, 384])
def test_widths(backend: str, last: bool, width: int) -> None:
    compare(backend, make(1, width, 1, 3, 7, last=last), norm="rms")
    compare(backend, make(1, width, 2, 2, 5, last=last), norm="group", groups=min(width, 3))
    compare(backend, make(1, width, 2, 2, 5, last=last), norm="group", groups=1, per_frame=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 64, 127, 128, 129, 300])
def test_lengths(backend: str, positions: int) -> None:
    for last, norm in itertools.product((False, True), ("rms", "group")):
        compare(backend, make(1, 6, 1, 1, positions, last=last), **NORMS[norm])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("keep", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("silu", [False, True])
def test_optional_parts(backend: str, norm: str, keep: tuple[str, ...], silu: bool) -> None:
    for last in (False, True):
        arguments = make(2, 6, 2, 3, 5, last=last)
        some = {k: v for k, v in arguments.items() if k == "x" or k in keep}
        compare(backend, some, silu=silu, **NORMS[norm])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_a_mean_far_from_zero_does_not_cancel(backend: str, last: bool) -> None:
    compare(backend, make(1, 12, 2, 12, 13, last=last, offset=300.0), norm="group", groups=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_large_and_vanishing_inputs(backend: str, last: bool) -> None:
    arguments = make(1, 8, 1, 4, 5, last=last)
    x = arguments["x"].detach()
    x[..., 0] = 0  # a position of zeros: l2 and RMS fall back on eps
    x[..., 1] *= 1e4
    x[..., 2] *= 1e-6
    arguments["x"] = x.requires_grad_()
    with torch.no_grad():
        arguments["weight"] *= 50  # SiLU far on both sides
    compare(backend, arguments, norm="rms")
    compare(backend, arguments, norm="l2", eps=1e-2)


@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_beyond_2_to_the_31st_element(backend: str, norm: str) -> None:
    x = randn(1, 3, 1, 1, 16, dtype=torch.float16)
    far, near = far_apart(x), x.clone()
    with use_backend(backend):
        results = [
            run(
                {"x": v.requires_grad_()},
                x,
                norm=norm,
                **({"groups": 3} if norm == "group" else {}),
            )
            for v in (far, near)
        ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in ("y", "dx"))


@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_makes_its_position_nan_as_in_pytorch(backend: str, norm: str) -> None:
    x = randn(1, 5, 2, 2, 2)
    x[0, 3, 1, 0, 1] = float("nan")
    with use_backend("reference"):
        expected = norm_silu(x, norm=norm).isnan()
    with use_backend(backend):
        assert torch.equal(norm_silu(x, norm=norm).isnan(), expected)
    assert expected.sum() == 5


def test_agrees_with_the_modules_that_models_use() -> None:
    x, weight, bias = (make(2, 12, 3, 5, 6)[k].detach() for k in ("x", "weight", "bias"))
    per_channel = (12, 1, 1, 1)
    wan = F.normalize(x, dim=1) * 12**0.5 * weight.view(per_channel) + bias.view(per_channel)
    rms = F.rms_norm(x.movedim(1, -1), (12,), weight, 1e-6).movedim(-1, 1)
    group = F.group_norm(x, 3, weight, bias, 1e-6)
    frames = x.transpose(1, 2).flatten(0, 1)
    per_frame = F.group_norm(frames, 3, weight, bias, 1e-6).unflatten(0, (2, 3)).transpose(1, 2)
    for backend in ("reference", *BACKENDS):
        with use_backend(backend):
            for got, want in (
                (norm_silu(x, weight, bias, norm="l2"), wan),
                (norm_silu(x, weight), rms),
                (norm_silu(x, weight, bias, norm="group", groups=3), group),
                (norm_silu(x, weight, bias, norm="group", groups=3, per_frame=True), per_frame),
            ):
                torch.testing.assert_close(got, F.silu(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ranks_and_strided_views(backend: str) -> None:
    base = randn(2, 9, 8, 7, 6, seed=5)
    views = {
        "image": base[:, :, 0],
        "image channels last": base[:, :, 0].contiguous(memory_format=torch.channels_last),
        "signal": base[:, :, 0, 0],
        "frames": base[:, :, 2:5],
        "frames channels last": base.contiguous(memory_format=LAST)[:, :, 2:5],
        "rows": base[:, :, :2, 1:4],
        "columns channels last": base.contiguous(memory_format=LAST)[..., 1:4],
        "channels": base[:, 2:5],
        "channels of channels last": base.contiguous(memory_format=LAST)[:, 2:5],
        "expanded": base[:, :, :, :, :1].expand(-1, -1, -1, -1, 6),
    }
    for name, view in views.items():
        for norm in ("rms", "group"):
            options: dict[str, Any] = {"norm": norm, "groups": 3}
            upstream = randn(*view.shape, seed=6)  # of another layout where x is channels last
            results = []
            for which in ("reference", backend):
                leaf = view.detach().requires_grad_()
                with use_backend(which):
                    y = norm_silu(leaf, **options)
                results.append((y.detach(), torch.autograd.grad(y, leaf, upstream)[0]))
            for want, got in zip(*results, strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients_and_mixed_dtypes(backend: str) -> None:
    x = make(2, 6, 2, 3, 4, last=True, dtype=torch.bfloat16)["x"]
    weight = randn(6, seed=8).requires_grad_()
    grads = []
    for which in ("reference", backend):
        with use_backend(which):
            y = norm_silu(x, weight)
            assert y.dtype is torch.bfloat16
            grads.append(torch.autograd.grad(y.sum(), (x, weight)))
    assert grads[1][1].dtype is torch.float32
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grads[1][1], grads[0][1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_only_wanted_gradients_and_the_same_bits(backend: str, norm: str) -> None:
    for last in (False, True):
        full = make(1, 6, 2, 4, 20, last=last)
        dy = randn(1, 6, 2, 4, 20, seed=4)
        with use_backend(backend):
            first, *others = (run(full, dy, **NORMS[norm]) for _ in range(3))
            for other in others:
                assert all(torch.equal(first[k], other[k]) for k in first)
            for keep in [("x",), ("weight",), ("bias",), ("x", "bias")]:
                some = {k: v.detach().requires_grad_(k in keep) for k, v in full.items()}
                got = run(some, dy, **NORMS[norm])
                assert got.keys() == {"y", *(f"d{k}" for k in keep)}
                assert all(torch.equal(got[k], first[k]) for k in got)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_do_not_change_bits(norm: str) -> None:
    threads = torch.get_num_threads()
    for last in (False, True):
        full = make(1, 24, 3, 20, 30, last=last)
        results = []
        try:
            for count in (1, 2, 3):  # from 2 on too few groups to run group by group
                torch.set_num_threads(count)
                with use_backend("native"):
                    results.append(run(full, randn(1, 24, 3, 20, 30, seed=4), **NORMS[norm]))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(results[0][k], other[k]) for k in other)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so each gets a process of its own."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.ops.test_norm_silu import NORMS, compare, make\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for last in (False, True):\n"
        "        for norm in NORMS.values():\n"
        "            compare('native', make(1, 33, 2, 9, 11, last=last, dtype=dtype), **norm)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SORA_KERNELS_ISA": isa},
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("norm", ["rms", "l2", "group per frame"])
def test_no_statistic_mixes_frames(norm: str) -> None:
    """A chunk of frames gives the bits that the whole video gives."""
    for backend, last in itertools.product(BACKENDS, (False, True)):
        x = make(1, 6, 5, 5, 7, last=last)["x"].detach()
        with use_backend(backend):
            whole = norm_silu(x, **NORMS[norm])
            parts = [norm_silu(part, **NORMS[norm]) for part in x.split([1, 3, 1], 2)]
        assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("last", [False, True])
def test_outputs_larger_than_the_cache(last: bool) -> None:
    x = make(1, 64, 3, 120, 100, last=last)["x"].detach()
    for norm in ("rms", "group"):
        options = NORMS[norm] | {"groups": 32}
        with use_backend("reference"):
            want = norm_silu(x, **options)
        with use_backend("native"):
            torch.testing.assert_close(norm_silu(x, **options), want, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 4, 9, 20))),
    norm=st.sampled_from(["rms", "group"]),
    last=st.booleans(),
    per_frame=st.booleans(),
)
def test_any_shape(shape: tuple[int, ...], norm: str, last: bool, per_frame: bool) -> None:
    # a variance near zero makes every implementation inexact: keep eps well above rounding
    options = {"groups": 1, "per_frame": per_frame} if norm == "group" else {}
    compare("native", make(*shape, last=last), norm=norm, eps=1e-2, **options)


def test_gradcheck_of_the_reference() -> None:
    arguments = to(make(1, 4, 2, 2, 3), torch.float64)
    for options in NORMS.values():
        given_options = options | ({"groups": 2} if "groups" in options else {})

        def call(x: Tensor, w: Tensor, b: Tensor, o: dict[str, Any] = given_options) -> Tensor:
            return norm_silu(x, w, b, **o)

        assert torch.autograd.gradcheck(call, tuple(arguments.values()))


def test_empty_input_and_meta_device() -> None:
    x = torch.zeros(2, 6, 0, 4, 4, requires_grad=True)
    assert norm_silu(x).shape == x.shape
    for options in NORMS.values():
        y = norm_silu(torch.empty(2, 6, 3, 4, 4, device="meta"), **options)
        assert y.device.type == "meta" and y.shape == (2, 6, 3, 4, 4)


# --- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(groups: int, last: bool) -> None:
    ops = torch.ops.sora_kernels
    raw = randn(2, 3, 5, 4) if last else randn(2, 4, 3, 5).permute(0, 2, 3, 1)
    weight, bias = randn(4, seed=1), randn(4, seed=2)
    arguments = (raw, weight, bias, groups, 1e-6, 0.0, True, last)
    torch.library.opcheck(ops.norm_silu_fwd.default, arguments)
    _, mean, rstd = ops.norm_silu_fwd(*arguments)
    for needs in (1, 2, 7):
        backward = (raw + 1, raw, mean, rstd, weight, bias, groups, 0.0, True, last, needs)
        torch.library.opcheck(ops.norm_silu_bwd.default, backward)


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    x = randn(1, 1, 3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.norm_silu_fwd(x, None, None, 0, 1e-6, 0.0, True, True)


def test_fullgraph_and_dynamic_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return norm_silu(x * 2, weight) + norm_silu(x, norm="group", groups=2)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for frames in (8, 9, 11, 10):
        x = make(1, 4, frames, 3, 7, last=True)["x"]
        weight = randn(4, seed=2).requires_grad_()
        dy = randn(1, 4, frames, 3, 7, seed=3)
        got = torch.autograd.grad(compiled(x, weight), (x, weight), dy)
        want = torch.autograd.grad(block(x, weight), (x, weight), dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four lengths"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a Tensor"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x: expected shape \[B, C, ...\]"),
        ({"x": torch.zeros(1, 4, 2, 2, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"norm": "batch"}, ValueError, "norm: expected one of"),
        ({"norm": "group", "groups": 3}, ValueError, "groups: expected a divisor of C = 4"),
        ({"norm": "group", "groups": 0}, ValueError, "groups: expected a divisor"),
        ({"per_frame": True}, ValueError, "per_frame: expected False unless"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight: expected shape \(4,\)"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias: expected device cpu"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm_silu(**{"x": torch.zeros(1, 4, 2, 3, 3), **arguments})


def test_a_width_that_does_not_fit_falls_back_and_says_so() -> None:
    x = randn(1, config.MAX_WIDTH + 1, 1, 1, 2)
    with use_backend("triton"):
        got = norm_silu(x)
    with use_backend("reference"):
        assert torch.equal(got, norm_silu(x))
