"""qk_norm_rope against its fp64 definition: norms, pairings, layouts, gradients, dispatch.

The conventions of published models are in test_conventions_rope.py.
"""

from __future__ import annotations

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

from sora_kernels import Rope, qk_norm_rope, use_backend
from sora_kernels.ops.qk_norm_rope import config
from tests.helpers import check, poisoned, randn
from tests.ops.rotated import AXES, leaf, make_rope

BACKENDS = ("native", "triton")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program of the Triton backward, as on a GPU with many more tokens."""
    monkeypatch.setattr(config, "_BACKWARD_PROGRAMS", 2)


def make(
    tokens: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    norm: str | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """q and k as views of one packed projection, and the parameters of the norm."""
    packed = randn(*tokens, sum(heads) + 2, width, seed=1, dtype=dtype)
    made: dict[str, Any] = {
        "q": packed[..., : heads[0], :].requires_grad_(),
        "k": packed[..., heads[0] + 1 : -1, :].requires_grad_(),
    }
    if norm is not None:
        for i, name in enumerate(("q_weight", "k_weight")):
            made[name] = leaf(width * (heads[i] if norm == "rms_full" else 1), seed=3 + i)
    if norm == "layer":
        made |= {"q_bias": leaf(width, seed=5), "k_bias": leaf(width, seed=6)}
    return made


def run(arguments: dict[str, Any], upstream: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients of one call, by name."""
    outputs = qk_norm_rope(**arguments, **options)
    wanted = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)],
    )
    results = {"q'": outputs[0].detach(), "k'": outputs[1].detach()}
    return results | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double().requires_grad_() for k, v in arguments.items()}


def compare(backend: str, arguments: dict[str, Any], **options: Any) -> None:
    """The 2x rule for outputs, the 3x rule for gradients, with random upstream gradients."""
    q, k = arguments["q"], arguments["k"]
    upstream = [randn(*x.shape, seed=70 + i, dtype=x.dtype) for i, x in enumerate((q, k))]
    with use_backend("reference"):
        exact = run(doubled(arguments), upstream, **options)
        lowp = run(arguments, upstream, **options)
    with use_backend(backend), poisoned():
        got = run(arguments, upstream, **options)
    assert got.keys() == exact.keys()
    truncates = backend == "triton" and q.dtype is torch.bfloat16
    for name, value in got.items():
        assert value.dtype == lowp[name].dtype, name
        check(
            value,
            exact[name],
            lowp[name],
            grad=name.startswith("d"),
            extra_ulp=1.0 if truncates else 0.0,
            name=f"{backend} {name}",
        )
    assert got["q'"].is_contiguous() and got["k'"].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [
        (1, (1, 1), 64),
        (1, (3, 3), 72),
        (63, (1, 1), 96),
        (63, (2, 2), 128),
        (100, (1, 1), 32),
        (12, (16, 16), 64),
    ],
)
def test_shapes(backend: str, tokens: int, heads: tuple[int, int], width: int) -> None:
    rope = make_rope(tokens, AXES[width])
    compare(backend, make((tokens,), heads, width, "rms"), rope=rope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "rms_full", None])
@pytest.mark.parametrize("pairing", ["interleaved", "half", "half_per_axis"])
def test_norms_and_pairings(backend: str, norm: str | None, pairing: str) -> None:
    """Width 64 takes the CPU's register path where the pairing allows it, 40 the general one."""
    for width, axes in ((64, AXES[64]), (40, (8, 12, 20)))[backend == "triton" :]:
        arguments = make((12,), (2, 1), width, norm)
        compare(backend, arguments, rope=make_rope(12, axes), norm=norm, pairing=pairing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer", "rms_full", None])
def test_low_precision(backend: str, dtype: torch.dtype, norm: str | None) -> None:
    arguments = make((63,), (2, 2), 72, norm, dtype)
    compare(backend, arguments, rope=make_rope(63, AXES[72]), norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairing", ["interleaved", "half", "half_per_axis"])
def test_partial_rotation(backend: str, pairing: str) -> None:
    """r = 28 of 40: the rest is normalised and passes through."""
    rope = make_rope(12, (8, 8, 12))
    compare(backend, make((12,), (2, 3), 40, "rms"), rope=rope, pairing=pairing)
    arguments = make((12,), (2, 2), 40, None)
    with use_backend(backend):
        turned = qk_norm_rope(**arguments, rope=rope, norm=None, pairing=pairing)[0]
    assert torch.equal(turned[..., 28:], arguments["q"][..., 28:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "rms_full"])
def test_norm_only_with_lengths_of_their_own(backend: str, norm: str) -> None:
    """Cross-attention: no rotation, more queries than keys."""
    arguments = make((40,), (2, 2), 64, norm)
    arguments["k"] = leaf(7, 2, 64, seed=9)
    compare(backend, arguments, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_only_leaves_text_alone(backend: str) -> None:
    """Text sits at position 0 of every axis: cos 1, sin 0, not a bit changes."""
    arguments = make((63,), (2, 2), 64, None)
    with use_backend(backend):
        q, k = qk_norm_rope(**arguments, rope=make_rope(63, AXES[64]), norm=None)
    assert torch.equal(q[:7], arguments["q"][:7]) and torch.equal(k[:7], arguments["k"][:7])
    assert not torch.equal(q[8:], arguments["q"][8:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False], ids=["rope of L", "rope of B*L"])
def test_dense_batches_of_a_longer_sequence(backend: str, shared: bool) -> None:
    """[B, L, H, D] slices whose batch and token strides do not collapse into one."""
    arguments = {
        name: randn(3, 20, 2, 72, seed=i)[:, 5:17].requires_grad_()
        for i, name in enumerate(("q", "k"))
    }
    arguments["q_weight"] = leaf(72, seed=4)
    one = make_rope(12, AXES[72])
    index = one.position_index
    rope = one if shared else Rope(one.cos, one.sin, index.flip(0).repeat(3, 1), one.axes)
    compare(backend, arguments, rope=rope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_per_head_and_given_tables(backend: str) -> None:
    """Mochi and LTX: every head has angles of its own; or one row of a table per token."""
    angles = randn(9, 3, 16, seed=5).double()
    index = torch.arange(12, dtype=torch.int32).remainder(9)[:, None]
    per_head = Rope(angles.cos().float(), angles.sin().float(), index, (32,))
    arguments = make((12,), (3, 3), 32, "rms_full")
    compare(backend, arguments, rope=per_head, norm="rms_full")
    given = Rope.from_tables(randn(12, 16, seed=6).cos(), randn(12, 16, seed=6).sin())
    compare(backend, arguments, rope=given, norm="rms_full", pairing="half")


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_of_size_zero_and_four_axes(backend: str) -> None:
    """An image model without time (0, 16, 16), and FLUX.2's four axes."""
    compare(backend, make((12,), (2, 2), 32, "rms"), rope=make_rope(12, (0, 16, 16)))
    angles = randn(7, 16, seed=5).double()
    index = torch.randint(0, 7, (12, 4), dtype=torch.int32)
    rope = Rope(angles.cos().float(), angles.sin().float(), index, (8, 4, 12, 8))
    for pairing in ("interleaved", "half_per_axis"):
        compare(backend, make((12,), (2, 2), 32, "rms"), rope=rope, pairing=pairing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_views_and_expanded_gradients(backend: str) -> None:
    base = randn(63, 2 * 3 * 64 + 1, seed=3)
    q, k = (base[:, 1:].unflatten(1, (2, 3, 64))[:, i].detach().requires_grad_() for i in range(2))
    rope = make_rope(63, AXES[64])
    upstreams = (
        [torch.ones(()).expand(63, 3, 64)] * 2,  # the gradient of a sum
        [randn(1, 3, 64, seed=8).expand(63, 3, 64), randn(63, 1, 64, seed=9).expand(63, 3, 64)],
    )
    for upstream in upstreams:
        with use_backend("reference"):
            expected = run({"q": q, "k": k}, upstream, rope=rope)
        with use_backend(backend):
            got = run({"q": q, "k": k}, upstream, rope=rope)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [64, 40])
def test_guard_bands(backend: str, width: int) -> None:
    """Kernels read nothing beside a view and write nothing outside their output."""
    frame = torch.full((5, 6, width + 32), float("nan"))
    frame[1:4, 1:5, 16:-16] = randn(3, 4, width)
    x = frame[1:4, 1:5, 16:-16]
    with use_backend(backend):
        q, k = qk_norm_rope(x[:, :2], x[:, 2:], torch.ones(width))
    assert torch.isfinite(q).all() and torch.isfinite(k).all()
    assert torch.isnan(frame[0]).all() and torch.isnan(frame[1:4, :, :16]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [64, 40])
def test_only_wanted_gradients(backend: str, width: int) -> None:
    """LoRA needs dq and dk alone; one output may be unused."""
    arguments = make((12,), (2, 1), width, "layer")
    rope = make_rope(12, (8, 12, 12))
    upstream = [randn(12, 2, width, seed=8), randn(12, 1, width, seed=9)]
    with use_backend(backend):
        everything = run(arguments, upstream, rope=rope, norm="layer")
        subsets = [("q", "k"), ("q",), ("k_weight",), ("q", "k_bias"), ("k", "k_weight", "k_bias")]
        for keep in subsets:
            some = {k: v.detach().requires_grad_(k in keep) for k, v in arguments.items()}
            got = run(some, upstream, rope=rope, norm="layer")
            assert set(got) == {"q'", "k'", *(f"d{name}" for name in keep)}
            for name, value in got.items():
                assert torch.equal(value, everything[name]), name
        yq, _ = qk_norm_rope(**arguments, rope=rope, norm="layer")
        leaves = list(arguments.values())
        grads = torch.autograd.grad(yq, leaves, upstream[0], allow_unused=True)
        for name, grad in zip(arguments, grads, strict=True):
            assert (grad is None) == name.startswith("k"), name
            assert grad is None or torch.equal(grad, everything[f"d{name}"]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time_and_packed_equals_alone(backend: str) -> None:
    arguments = make((100,), (2, 2), 64, "rms")
    upstream = [randn(100, 2, 64, seed=8), randn(100, 2, 64, seed=9)]
    rope = make_rope(100, AXES[64])
    with use_backend(backend):
        first, *others = (run(arguments, upstream, rope=rope) for _ in range(3))
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first)
        for part in (slice(0, 64), slice(64, 100))[backend == "triton" :]:  # the segments
            alone = {k: v if "_" in k else v[part].detach() for k, v in arguments.items()}
            alone = {k: v.detach().requires_grad_() for k, v in alone.items()}
            piece = Rope(rope.cos, rope.sin, rope.position_index[part], rope.axes)
            single = run(alone, [u[part] for u in upstream], rope=piece)
            for name in ("q'", "k'", "dq", "dk"):
                assert torch.equal(single[name], first[name][part]), name


def test_threads_do_not_change_bits() -> None:
    arguments = make((100,), (2, 2), 72, "layer")
    upstream = [randn(100, 2, 72, seed=8), randn(100, 2, 72, seed=9)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                rope = make_rope(100, AXES[72])
                results.append(run(arguments, upstream, rope=rope, norm="layer"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def test_large_outputs_bypass_the_cache_with_the_same_bits() -> None:
    """Over 8 MiB of output the C++ kernels write past the cache; 71 heads of 72 end mid-line."""
    q = randn(220, 71, 72, seed=1).requires_grad_()
    rope = Rope.from_tables(randn(220, 36, seed=2).cos(), randn(220, 36, seed=2).sin())
    upstream = [randn(220, 71, 72, seed=3)] * 2
    with use_backend("native"):
        big = run({"q": q, "k": q}, upstream, rope=rope)
        part = q[:50].detach().requires_grad_()
        piece = Rope(rope.cos, rope.sin, rope.position_index[:50], rope.axes)
        small = run({"q": part, "k": part}, [u[:50] for u in upstream], rope=piece)
    for name, value in small.items():
        assert torch.equal(big[name][:50], value), name


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so each gets a process of its own."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.ops.test_qk_norm_rope import AXES, compare, make, make_rope\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for width in (64, 40):\n"
        "        for norm in ('layer', 'rms_full'):\n"
        "            for pairing in ('interleaved', 'half'):\n"
        "                axes = AXES.get(width, (8, 12, 12))\n"
        "                compare('native', make((12,), (3, 2), width, norm, dtype), norm=norm,\n"
        "                        rope=make_rope(12, axes), pairing=pairing)\n"
    )
    environment = os.environ | {"SORA_KERNELS_ISA": isa}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 70),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    half=st.integers(1, 70),
    rotated=st.floats(0, 1),
    norm=st.sampled_from(["rms", "layer", "rms_full", None]),
    pairing=st.sampled_from(["interleaved", "half"]),
)
def test_any_shape(
    tokens: int, heads: tuple[int, int], half: int, rotated: float, norm: str | None, pairing: str
) -> None:
    arguments = make((tokens,), heads, 2 * half, norm)
    angles = randn(tokens, max(1, round(half * rotated)), seed=4)
    rope = Rope.from_tables(angles.cos(), angles.sin())
    # a variance near zero makes every implementation inexact: keep eps well above rounding
    compare("native", arguments, rope=rope, norm=norm, pairing=pairing, eps=1e-2)


def test_gradcheck_of_the_reference() -> None:
    arguments = doubled(make((1,), (2, 1), 6, "layer"))
    angles = randn(1, 2, seed=4).double()
    rope = Rope.from_tables(angles.cos(), angles.sin())
    for pairing in ("interleaved", "half"):

        def call(*tensors: Tensor, pairing: str = pairing) -> tuple[Tensor, Tensor]:
            named = dict(zip(arguments, tensors, strict=True))
            return qk_norm_rope(**named, rope=rope, norm="layer", pairing=pairing)

        assert torch.autograd.gradcheck(call, tuple(arguments.values()))


# --- rounding laws ------------------------------------------------------------------------------


def rotate_in_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers.models.embeddings.apply_rotary_emb with use_real=True, interleaved."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def eager(law: str, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What each law stands for, in plain PyTorch."""
    if law == "torch":
        return rotate_in_fp32(F.rms_norm(x, weight.shape, weight, 1e-6), cos, sin)
    xhat = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    u = xhat.to(x.dtype) * weight
    if law == "diffusers_rms":
        return rotate_in_fp32(u, cos, sin)
    a, b = u.chunk(2, -1)  # transformers.models.llama: everything in the storage dtype
    rotated = torch.cat((-b, a), -1)
    c, s = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
    return u * c + rotated * s


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("law", ["torch", "diffusers_rms", "llama_rms"])
def test_laws_are_bit_equal_to_their_expression(law: str, dtype: torch.dtype) -> None:
    """At least 99.9% of outputs bit-equal, the rest within 1 ulp of the largest intermediate."""
    q = randn(100, 8, 128, dtype=dtype, seed=1)
    weight = randn(128, dtype=dtype, seed=2)
    rope = make_rope(100, AXES[128])
    cos, sin = (t.unsqueeze(1) for t in rope.dense())
    expected = eager(law, q, weight, cos, sin)
    pairing = "half" if law == "llama_rms" else "interleaved"
    with use_backend("native"):
        got = qk_norm_rope(q, q, weight, weight, rope, pairing=pairing, law=law)[0]
        once = qk_norm_rope(q, q, weight, weight, rope, pairing=pairing)[0]
    equal = (got == expected).float().mean().item()
    assert equal >= 0.999, f"{equal:.4%} bit-equal"
    largest = 2 * expected.abs().max().double()
    spacing = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(dtype).eps
    assert (got.double() - expected.double()).abs().max() <= spacing
    assert (once == expected).float().mean() < 0.95, "the law must make a difference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("law", ["torch", "llama_rms", ("xhat",), ("pre_rope",)], ids=str)
def test_laws_keep_the_2x_rule(backend: str, law: Any) -> None:
    for norm in ("rms", "layer")[backend == "triton" :]:
        arguments = make((12,), (2, 1), 64, norm, torch.float16)
        compare(backend, arguments, rope=make_rope(12, AXES[64]), norm=norm, law=law)


def test_launch_configurations() -> None:
    for heads in (1, 3, 12, 16, 24, 30, 40, 48):
        for width in (32, 64, 72, 96, 128, 256):
            for across in (False, True):
                for backward in (False, True):
                    made = config.tile(heads, width, across, backward)
                    assert 2 * made.pairs >= width
                    assert not across or made.heads >= heads
                    assert across or -(-heads // made.heads) * made.heads <= 1.125 * heads
                    for value in (made.tokens, made.heads, made.pairs, made.num_warps):
                        assert value & (value - 1) == 0
    assert config.backward_steps(1 << 20, 2, 1) == 64 and config.backward_steps(1, 2, 1) == 1
