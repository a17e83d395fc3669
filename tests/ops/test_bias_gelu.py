"""bias_gelu against its fp64 reference: every backend, dtype, layout and odd width."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sora_kernels
from sora_kernels import backend, bias_gelu
from sora_kernels.ops.bias_gelu import config
from sora_kernels.ops.bias_gelu.reference import bias_gelu_reference
from tests.helpers import WIDTHS, check, poisoned, randn

BACKENDS = ["native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(x: Tensor, bias: Tensor | None, dy: Tensor, chosen: str) -> tuple[Tensor, ...]:
    """y, dx and, with a bias, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    with backend.use_backend(chosen), poisoned():
        y = bias_gelu(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def compare(x: Tensor, bias: Tensor | None, dy: Tensor, chosen: str) -> None:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    got = run(x, bias, dy, chosen)
    exact = run(x.double(), wide(bias), dy.double(), "reference")
    low = run(x, bias, dy, "reference")
    slack = 1.0 if x.dtype is torch.bfloat16 and chosen == "triton" else 0.0
    for i, name in enumerate(("y", "dx", "dbias")[: len(got)]):
        check(got[i], exact[i], low[i], grad=i > 0, extra_ulp=slack, name=name)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(chosen: str, dtype: torch.dtype, width: int) -> None:
    x, dy = randn(35, width, dtype=dtype), randn(35, width, dtype=dtype, seed=1)
    compare(3 * x, randn(width, dtype=dtype, seed=2), dy, chosen)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_every_number_of_tokens(chosen: str, tokens: int) -> None:
    compare(randn(tokens, 72), randn(72, seed=2), randn(tokens, 72, seed=1), chosen)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_without_bias_and_with_a_bias_of_another_dtype(chosen: str) -> None:
    x, dy = randn(9, 40, dtype=torch.bfloat16), randn(9, 40, dtype=torch.bfloat16, seed=1)
    compare(x, None, dy, chosen)
    compare(x, randn(40, seed=2), dy, chosen)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_strided_views_and_expanded_gradients(chosen: str) -> None:
    chunk = randn(3, 10, 3, 48)[:, :, 1]  # [3, 10, 48], rows 144 apart
    offset = randn(1 + 20 * 48)[1:].view(20, 48)
    for x in (chunk, offset, randn(2, 3, 4, 48)):
        dy = randn(1, seed=1).expand(x.shape)
        compare(x, randn(48, seed=2), dy, chosen)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_far_from_zero_nothing_overflows_or_cancels(chosen: str) -> None:
    x = torch.tensor([[-1e4, -100.0, -12.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 12.0, 100.0, 1e4]])
    with backend.use_backend(chosen):
        y = bias_gelu(x)
    want = F.gelu(x.double(), approximate="tanh")
    # Relative to the value itself: PyTorch's own fp32 loses all digits at -6. The argument of e^-2z
    # carries a relative error of a few ulp, which grows by its size, 22 at x = -6.
    near = x.abs() <= 6
    torch.testing.assert_close(y[near].double(), want[near], rtol=2e-5, atol=0)
    torch.testing.assert_close(y[~near].double(), want[~near], rtol=1e-6, atol=1e-12)
    with backend.use_backend(chosen):
        assert bias_gelu(torch.tensor([[float("nan")]])).isnan().all()


@pytest.mark.parametrize("chosen", BACKENDS)
def test_reruns_are_bitwise_equal_and_packed_equals_alone(chosen: str) -> None:
    x, bias, dy = randn(70, 65), randn(65, seed=2), randn(70, 65, seed=1)
    first = run(x, bias, dy, chosen)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(x, bias, dy, chosen), strict=True))
    y, dx, _ = run(x[33:40], bias, dy[33:40], chosen)
    assert torch.equal(y, first[0][33:40]) and torch.equal(dx, first[1][33:40])


@given(st.integers(1, 70), st.integers(1, 200), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_shape(tokens: int, width: int, with_bias: bool) -> None:
    bias = randn(width, seed=2) if with_bias else None
    compare(randn(tokens, width), bias, randn(tokens, width, seed=1), "native")


def test_threads_do_not_change_a_bit() -> None:
    x, bias, dy = randn(300, 1200), randn(1200, seed=2), randn(300, 1200, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x, bias, dy, "native")
        torch.set_num_threads(2)
        two = run(x, bias, dy, "native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so each gets a process of its own."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.ops.test_bias_gelu import DTYPES, compare, randn\n"
        "for dtype in DTYPES:\n"
        "    for width in (63, 96):\n"
        "        x, dy = randn(35, width, dtype=dtype), randn(35, width, dtype=dtype, seed=1)\n"
        "        compare(3 * x, randn(width, seed=2), dy, 'native')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SORA_KERNELS_ISA": isa},
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_error_of_the_gradient_is_an_ulp() -> None:
    x = torch.linspace(-8, 8, 20001)[None]
    got = run(x, None, torch.ones_like(x), "native")[1]
    exact = run(x.double(), None, torch.ones_like(x).double(), "reference")[1]
    assert (got.double() - exact).abs().max().item() < 2e-7  # PyTorch's formula: 1e-6


def test_reference_gradients() -> None:
    x, bias = randn(3, 5, dtype=torch.float64), randn(5, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(
        bias_gelu_reference, (x.requires_grad_(), bias.requires_grad_())
    )


def test_empty_tensors() -> None:
    bias = randn(8).requires_grad_()
    y = bias_gelu(torch.empty(0, 8), bias)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(8))


def test_only_what_is_asked_for_is_computed() -> None:
    x, bias = randn(4, 8).requires_grad_(), randn(8, seed=2)
    y = bias_gelu(x, bias)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and bias.grad is None
    tokens = x.detach()[None]
    dx, dbias = torch.ops.sora_kernels.bias_gelu_bwd(tokens, tokens, bias, False)
    assert dx.shape == tokens.shape and dbias.numel() == 0


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.ones(4), None, "x: expected shape"),
        (torch.ones(4, 4, dtype=torch.int32), None, "x: expected float32"),
        (torch.ones(4, 4), torch.ones(3), r"bias: expected shape \(4,\), got \(3,\)"),
        (torch.ones(4, 4), torch.ones(4, dtype=torch.int64), "bias: expected a floating dtype"),
    ],
)
def test_bad_input_is_named(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bias_gelu(x, bias)


def test_raw_ops_are_registered_in_full() -> None:
    x, bias = randn(6, 1, 40), randn(40, seed=2)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    raw = torch.ops.sora_kernels
    torch.library.opcheck(raw.bias_gelu_fwd.default, (x, bias), test_utils=checks)
    torch.library.opcheck(raw.bias_gelu_fwd.default, (x, None), test_utils=checks)
    for need in (True, False):
        torch.library.opcheck(raw.bias_gelu_bwd.default, (x, x, bias, need), test_utils=checks)
    with pytest.raises(RuntimeError, match="has no gradient"):
        raw.bias_gelu_fwd(x.requires_grad_(), bias)


def test_compiles_in_one_graph_and_keeps_its_numbers() -> None:
    linear = nn.Linear(24, 40)

    def mlp(h: Tensor) -> Tensor:
        return bias_gelu(F.linear(h, linear.weight), linear.bias)

    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        h = randn(tokens, 24)
        want, got = mlp(h), compiled(h)
        assert torch.equal(want, got)
        grads = [torch.autograd.grad(y.sum(), [*linear.parameters()]) for y in (want, got)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_explain_names_the_fast_path() -> None:
    bias_gelu(randn(2, 8))
    bias_gelu(randn(2, 8).double())
    assert "bias_gelu on cpu: reference" in sora_kernels.explain()
    bias_gelu(randn(2, 8))
    expected = "native" if backend.why_not("bias_gelu", "native", "cpu") is None else "reference"
    assert f"bias_gelu on cpu: {expected}" in sora_kernels.explain()


def test_launch_configurations_cover_any_width() -> None:
    for width in (1, 15, 1024, 1025, 12288, 40000):
        rows, block_d, warps = config.forward(width)
        assert rows * block_d >= 2048 // 2 and block_d & (block_d - 1) == 0 and warps >= 1
        tile = config.backward(100000, width, 4)
        assert all(size & (size - 1) == 0 for size in tile[:3]) and tile.num_warps >= 1
        assert tile.block_tokens % tile.block_rows == 0 and tile.num_stages >= 2
