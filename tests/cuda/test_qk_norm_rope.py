"""The CUDA kernels of qk_norm_rope, run by the emulator, against the fp64 definition and the CPU's.

The source is that of a CUDA build, bindings included; no GPU has a part in it. Every result lies
between guard bands and is NaN until it is written (`tests.cuda_emulator`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Rope, Text, qk_norm_rope, qk_norm_rope_joint
from sora_kernels import use_backend as using
from tests.cuda_emulator import backwards, emulated
from tests.helpers import randn
from tests.ops.test_qk_norm_rope import compare, make, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("rms", "layer", "rms_full", None)


def agree(arguments: dict[str, Any], **options: Any) -> None:
    """The 2x rule (3x for gradients) for the emulated kernels."""
    with emulated():
        compare("native", arguments, **options)


def given(tokens: int, *axes: int, heads: int = 0) -> Rope:
    """Tables with a row for every token."""
    shape = (tokens, *([heads] if heads else []), sum(axes) // 2)
    index = torch.arange(tokens, dtype=torch.int32).flip(0)[:, None]
    angle = randn(*shape, seed=7)
    return Rope(angle.cos(), angle.sin(), index, axes)


def grids(tokens: int, axes: tuple[int, ...], order: str = "raster") -> Rope:
    """Positions that the kernel computes from the grids of a layout; with text if it is odd."""
    text = [Text(tokens % 2 * 5)] if tokens % 2 else []
    rest = tokens - tokens % 2 * 5
    return PackedLayout([[*text, Grid(2, 2, rest // 4)]], order=order).rope(axes, theta=100.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(1, (1, 1), 6), (7, (5, 3), 72), (3, (3, 1), 128), (33, (1, 1), 64), (2, (1, 3), 240)],
)
def test_shapes(tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    """Packed views of one projection, as many or fewer heads of k, vectors and single numbers."""
    agree(make((tokens,), heads, width, "rms", dtype), rope=given(tokens, width))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pairing", ["interleaved", "half", "half_per_axis"])
def test_norms_and_pairings(norm: str | None, pairing: str) -> None:
    """Axes that vectors fit (multiples of 16 components), and some that they do not."""
    for width, axes in ((64, (16, 16, 32)), (30, (6, 12, 4))):
        arguments = make((7,), (3, 2), width, norm, torch.bfloat16)
        agree(arguments, rope=given(7, *axes), norm=norm, pairing=pairing)


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_positions_from_grids(order: str) -> None:
    axes = (8, 12, 12)
    for tokens in (8, 33):
        rope = grids(tokens, axes, order)
        agree(make((tokens,), (2, 1), 32, "rms"), rope=rope)
        agree(make((tokens,), (1, 1), 40, None), rope=rope, norm=None)


def test_long_heads() -> None:
    """More components than the lanes of a warp hold at a time, up to a single group per block."""
    agree(make((2,), (1, 1), 600, "layer"), rope=given(2, 300), norm="layer", pairing="half")
    agree(make((3,), (2, 1), 270, "rms_full", torch.float16), rope=given(3, 270), norm="rms_full")


def test_a_norm_across_many_heads() -> None:
    """More heads than groups of a block; so many that their gradients do not fit shared memory."""
    agree(make((2,), (70, 2), 64, "rms_full"), rope=given(2, 64), norm="rms_full")
    agree(make((2,), (1, 130), 96, "rms_full", torch.bfloat16), rope=given(2, 96), norm="rms_full")


def test_tables_per_head() -> None:
    for width in (32, 36):
        rope = given(5, width, heads=3)
        agree(make((5,), (3, 3), width, "rms_full"), rope=rope, norm="rms_full")
        agree(make((5,), (3, 3), width, "rms"), rope=rope, pairing="half")


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_strides_and_offsets(offset: int) -> None:
    """[B, L, H, D] slices of a larger tensor; nothing beside them is read."""
    frame = torch.full((2 * 9 * 5 * 32 + 8,), float("nan"), dtype=torch.bfloat16)
    views = []
    for i in range(2):
        view = frame.clone()[offset : offset + 2 * 9 * 5 * 32].view(2, 9, 5, 32)[:, 1:8, 1 : 3 + i]
        views.append(view.copy_(randn(*view.shape, seed=i)).requires_grad_())
    arguments = {"q": views[0], "k": views[1], "q_weight": randn(32, seed=4).requires_grad_()}
    agree(arguments, rope=given(7, 32))
    agree(arguments, rope=given(14, 32), norm="rms", pairing="half")


def joint(norm: str, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    layout = PackedLayout([[Text(3), Grid(1, 2, 3)], [Grid(1, 2, 2), Text(2)]])
    rope = layout.rope((8, 12, 12))
    sizes = (layout.num_text_tokens, layout.num_grid_tokens)
    streams = [
        list(randn(n, 5, width, seed=s, dtype=dtype).split((2, 1, 2), 1))
        for s, n in enumerate(sizes)
    ]
    weights = [
        [randn(width * (h if norm == "rms_full" else 1), seed=9 + 2 * s + i) for s in range(2)]
        for i, h in enumerate((2, 1))
    ]
    leaves = [t.requires_grad_() for t in (*streams[0], *streams[1], *weights[0], *weights[1])]

    def call() -> tuple[Tensor, ...]:
        results = qk_norm_rope_joint(
            [leaves[:3], leaves[3:6]], leaves[6:8], leaves[8:], rope, norm=norm,
            index=(layout.text_tokens, layout.grid_tokens),
        )  # fmt: skip
        upstream = [randn(*y.shape, seed=40 + i, dtype=dtype) for i, y in enumerate(results)]
        return (*results, *torch.autograd.grad(results, leaves, upstream))

    return leaves, call


@pytest.mark.parametrize("norm", ["rms", "rms_full"])
def test_joint_streams(norm: str) -> None:
    """Weights per stream, rows to and from their places in the joint sequence, and v copied."""
    for width in (32, 36):
        _, call = joint(norm, width, torch.float32)
        with using("reference"):
            expected = call()
        with emulated():
            got = call()
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
        assert torch.equal(got[2], expected[2]) and torch.equal(got[5], expected[5])


def test_groups_of_one_packed_tensor() -> None:
    layout = PackedLayout([[Text(3), Grid(1, 2, 3)], [Grid(1, 2, 2), Text(2)]])
    index = (layout.text_tokens, layout.grid_tokens)
    x = randn(layout.num_tokens, 2, 32).requires_grad_()
    weights = [randn(32, seed=s).requires_grad_() for s in range(2)]

    def call() -> tuple[Tensor, ...]:
        y = qk_norm_rope(x, x, weights, weights, layout.rope((8, 12, 12)), groups=index)
        return (*y, *torch.autograd.grad(y, [x, *weights], [x.detach(), x.detach().flip(0)]))

    with using("native"):
        expected = call()
    with emulated():
        got = call()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def exact_statistics(tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Small integers of mean 0: their sums are exact, so statistics do not depend on the order."""
    half = torch.randint(1, 8, (tokens, heads, width // 2), generator=torch.Generator())
    return torch.cat((half, -half), -1).to(dtype).requires_grad_()


@pytest.mark.parametrize("law", ["torch", "diffusers_rms", "llama_rms"])
@pytest.mark.parametrize("norm", NORMS)
def test_laws_have_the_bits_of_the_cpu(norm: str | None, law: str) -> None:
    for dtype, pairing, width in (
        (torch.bfloat16, "interleaved", 32),
        (torch.float16, "half", 32),
        (torch.bfloat16, "half_per_axis", 20),
    ):
        arguments = make((5,), (2, 3), width, norm, dtype)
        arguments |= {"q": exact_statistics(5, 2, width, dtype)}
        arguments |= {"k": exact_statistics(5, 3, width, dtype)}
        upstream = [randn(5, h, width, seed=h, dtype=dtype) for h in (2, 3)]
        options: dict[str, Any] = {"norm": norm, "pairing": pairing, "law": law}
        options["rope"] = given(5, width // 4 * 2, 4)
        with using("native"):
            cpu = run(arguments, upstream, **options)
        with emulated():
            got = run(arguments, upstream, **options)
        for name in got:
            if not name.startswith("d") or norm is None:
                assert torch.equal(got[name], cpu[name]), name
        agree(arguments, **options)


def test_the_order_of_threads_does_not_matter() -> None:
    arguments = make((9,), (3, 5), 64, "rms_full")
    upstream = [randn(9, h, 64, seed=h) for h in (3, 5)]
    options: dict[str, Any] = {"norm": "rms_full", "rope": given(9, 64)}
    with emulated():
        forwards = run(arguments, upstream, **options)
        with backwards():
            other = run(arguments, upstream, **options)
    for name, value in forwards.items():
        assert torch.equal(value, other[name]), name


def test_only_wanted_gradients_and_no_tokens() -> None:
    arguments = make((4,), (2, 2), 32, "layer")
    rope = given(4, 32)
    with emulated():
        everything = run(arguments, [arguments["q"].detach(), arguments["k"].detach()], rope=rope,
                         norm="layer")  # fmt: skip
        q, k = qk_norm_rope(**arguments, rope=rope, norm="layer")
        for name, y, upstream in (("k_bias", k, "k"), ("q", q, "q"), ("q_weight", q, "q")):
            grad = torch.autograd.grad(
                y, arguments[name], arguments[upstream].detach(), retain_graph=True
            )
            assert torch.equal(grad[0], everything[f"d{name}"]), name
        none = torch.empty(0, 2, 32, requires_grad=True)
        weight = randn(32).requires_grad_()
        q, _ = qk_norm_rope(none, none, weight, weight)
        assert q.shape == none.shape
        assert torch.autograd.grad(q.sum(), weight)[0].eq(0).all()
