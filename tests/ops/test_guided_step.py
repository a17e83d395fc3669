"""guided_step against its definition: every backend, dtype, layout; guidance and dt per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import RowMap, backend, guided_step
from sora_kernels.ops.guided_step.config import choose_config
from sora_kernels.ops.guided_step.reference import guided_step_reference
from tests.helpers import WIDTHS, check, poisoned, randn

BACKENDS = ["native", "triton"]
PAIRS = [  # state, velocity
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def inputs(
    *shape: int, state: torch.dtype = torch.float32, velocity: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(*shape, dtype=state)
    return x, randn(*shape, dtype=velocity, seed=1), randn(*shape, dtype=velocity, seed=2)


def run(
    chosen: str, x: Tensor, cond: Tensor, uncond: Tensor | None, dout: Tensor, **options: object
) -> tuple[Tensor, ...]:
    """The step and the gradients of x, cond and uncond."""
    leaves = [t.detach().requires_grad_() for t in (x, cond, uncond) if t is not None]
    with backend.use_backend(chosen), poisoned():
        out = guided_step(*leaves, **options)  # type: ignore[arg-type]
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def compare(chosen: str, x: Tensor, cond: Tensor, uncond: Tensor | None, **options: object) -> None:
    dout = randn(*x.shape, dtype=x.dtype, seed=3)
    wide = [None if t is None else t.double() for t in (x, cond, uncond, dout)]
    got = run(chosen, x, cond, uncond, dout, **options)
    exact = run("reference", *wide, **options)  # type: ignore[arg-type]
    low = run("reference", x, cond, uncond, dout, **options)
    for i, name in enumerate(("out", "dx", "dcond", "duncond")[: len(got)]):
        slack = 1.0 if got[i].dtype is torch.bfloat16 and chosen == "triton" else 0.0
        check(got[i], exact[i], low[i], grad=i > 0, extra_ulp=slack, name=name)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(chosen: str, width: int) -> None:
    compare(chosen, *inputs(9, width), dt=-0.1, guidance=6.0)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("state, velocity", PAIRS)
def test_every_dtype_with_and_without_guidance(
    chosen: str, state: torch.dtype, velocity: torch.dtype
) -> None:
    x, cond, uncond = inputs(5, 72, state=state, velocity=velocity)
    compare(chosen, x, cond, uncond, dt=-0.25, guidance=3.0)
    compare(chosen, x, cond, None, dt=0.5)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_dense_latents_with_a_number_per_sample(chosen: str) -> None:
    dt, guidance = torch.tensor([-0.1, -0.3, 0.0]), torch.tensor([1.0, 7.5, 0.0])
    for shape in ((3, 4, 5, 6, 7), (3, 2, 40, 30), (3, 11, 600)):
        x, cond, uncond = inputs(*shape)
        compare(chosen, x, cond, uncond, dt=dt, guidance=guidance)
        with backend.use_backend(chosen):
            whole = guided_step(x, cond, uncond, dt=dt, guidance=guidance)
            for b in range(3):
                one = guided_step(
                    x[b : b + 1],
                    cond[b : b + 1],
                    uncond[b : b + 1],
                    dt=float(dt[b]),
                    guidance=float(guidance[b]),
                )
                assert torch.equal(whole[b : b + 1], one)


ROWS = [
    RowMap.from_index(torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3]), 4),  # row 1 has no token
    RowMap.from_index(torch.tensor([1, 0, 3, 0, 1, 3, 3, 0, 0]), 4),  # scattered
    RowMap.uniform(3, 3),
]


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_clips_with_their_own_numbers(chosen: str, rescale: float, rows: RowMap) -> None:
    x, cond, uncond = inputs(9, 40)
    dt = torch.linspace(-0.4, -0.1, rows.num_rows)
    guidance = torch.linspace(1.0, 8.0, rows.num_rows)
    index = torch.arange(9) // 3 if rows.index is None else rows.index
    with backend.use_backend(chosen):
        got = guided_step(x, cond, uncond, dt=dt, guidance=guidance, rescale=rescale, rows=rows)
    for r in range(rows.num_rows):
        mine = (index == r).nonzero()[:, 0]
        if not len(mine):
            continue
        c, u = cond[mine].double(), uncond[mine].double()
        v = u + guidance[r].double() * (c - u)
        v = v * (rescale * c.std() / v.std() + 1 - rescale)
        torch.testing.assert_close(
            got[mine].double(), x[mine] + dt[r].double() * v, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 8)])
def test_rescaled_steps_are_differentiable(shape: tuple[int, ...]) -> None:
    leaves = [t.double().requires_grad_() for t in inputs(*shape)]

    def step(*given: Tensor) -> Tensor:
        return guided_step(*given, dt=-0.3, guidance=4.0, rescale=0.7)

    assert torch.autograd.gradcheck(step, leaves)


def test_a_constant_velocity_is_not_rescaled() -> None:
    x = randn(4, 8)
    ones = torch.ones(4, 8)
    got = guided_step(x, ones, 0.5 * ones, dt=-1.0, guidance=2.0, rescale=1.0)
    torch.testing.assert_close(got, x - 1.5)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_halves_of_one_batch_and_expanded_gradients(chosen: str) -> None:
    both = randn(2, 6, 3, 64)[:, :, 1]  # strided: [2, 6, 64], rows 192 apart
    x = randn(6, 64)
    compare(chosen, x, both[0], both[1], dt=-0.1, guidance=2.0)
    leaf = x.clone().requires_grad_()
    with backend.use_backend(chosen):
        guided_step(leaf, both[0], both[1], dt=-0.1, guidance=2.0).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_reference_gradients() -> None:
    leaves = [t.double().requires_grad_() for t in inputs(4, 5)]
    numbers = torch.tensor([2.0, -0.5], dtype=torch.float64)
    rows = torch.tensor([0, 1, 1, 0])

    def step(*given: Tensor) -> Tensor:
        return guided_step_reference(*given, numbers, numbers.flip(0), rows)

    assert torch.autograd.gradcheck(step, leaves)


@given(st.integers(1, 40), st.integers(1, 90), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_shape(tokens: int, width: int, guided: bool) -> None:
    x, cond, uncond = inputs(tokens, width)
    compare("native", x, cond, uncond if guided else None, dt=-0.2, guidance=5.0)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_reruns_are_bitwise_equal(chosen: str) -> None:
    given_, dout = inputs(33, 65), randn(33, 65, seed=3)
    first = run(chosen, *given_, dout, dt=-0.1, guidance=6.0)
    for _ in range(2):
        again = run(chosen, *given_, dout, dt=-0.1, guidance=6.0)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty_pack() -> None:
    empty = torch.empty(0, 8)
    assert guided_step(empty, empty, empty, dt=-0.1).shape == (0, 8)


def test_only_what_is_asked_for_is_computed() -> None:
    dout, one = randn(1, 4, 8), torch.ones(1)
    raw = torch.ops.sora_kernels.guided_step_bwd
    dcond, duncond = raw(dout, one, one, None, 4, torch.bfloat16, True, 2)
    assert dcond.numel() == 0 and duncond.shape == dout.shape


GOOD = randn(6, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cond": randn(6, 7)}, r"cond: expected shape \(6, 8\)"),
        ({"cond": GOOD.double()}, "cond: expected torch.float32"),
        ({"uncond": GOOD.bfloat16()}, "uncond: expected torch.float32"),
        ({"dt": torch.ones(2)}, r"dt: expected shape \(1,\), got \(2,\)"),
        ({"guidance": torch.ones(6)}, r"guidance: expected shape \(1,\), got \(6,\)"),
        ({"dt": torch.ones((), requires_grad=True)}, "dt: expected a tensor that requires no grad"),
        ({"rescale": 1.5}, r"rescale: expected a number in \[0, 1\], got 1.5"),
        ({"rows": RowMap.uniform(2, 4)}, "rows: expected a map of 6 tokens, got 8"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"cond": GOOD, "uncond": GOOD, "dt": -0.1, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        guided_step(GOOD, **options)  # type: ignore[arg-type]


def test_raw_ops_are_registered_in_full() -> None:
    x, cond, uncond = (t[None] for t in inputs(6, 40))
    numbers, index = torch.tensor([1.0, 2.0]), torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    raw = torch.ops.sora_kernels
    for free in (uncond, None):
        args = (x, cond, free, numbers, numbers, index, 0)
        torch.library.opcheck(raw.guided_step_fwd.default, args, test_utils=checks)
    for needs in (1, 2, 3):
        args = (x, numbers, numbers, None, 3, torch.bfloat16, True, needs)
        torch.library.opcheck(raw.guided_step_bwd.default, args, test_utils=checks)
    with pytest.raises(RuntimeError, match="has no gradient"):
        raw.guided_step_fwd(x.requires_grad_(), cond, uncond, numbers, numbers, None, 3)


def test_compiles_in_one_graph() -> None:
    def step(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        return guided_step(x, cond, uncond, dt=-0.1, guidance=3.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        leaves = [t.requires_grad_() for t in inputs(tokens, 24)]
        want, got = step(*leaves), compiled(*leaves)
        assert torch.equal(want, got)
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (want, got)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_launch_configuration_covers_any_width() -> None:
    for width in (1, 64, 1025, 30000):
        rows, block_d, warps = choose_config(width)
        assert rows >= 1 and block_d & (block_d - 1) == 0 and warps == 4
