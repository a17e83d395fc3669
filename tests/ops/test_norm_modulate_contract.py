"""norm_modulate as an op of torch, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sora_kernels import RowMap, norm_modulate
from tests.helpers import randn


def leaf(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def raw_arguments(two: bool = False, rms: bool = False) -> tuple[Any, ...]:
    x, shift, scale = randn(2, 5, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)
    extra = (randn(2, 8, seed=3), randn(2, 8, seed=4)) if two else (None, None)
    mods = (None, None, shift, scale, None, None, *extra)
    return (x, *mods, None, 5, 1e-6, rms, 0, torch.float32)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck(two: bool, rms: bool) -> None:
    ops = torch.ops.sora_kernels
    arguments = raw_arguments(two, rms)
    torch.library.opcheck(ops.norm_modulate_fwd.default, arguments)
    y, y2, mean, rstd = ops.norm_modulate_fwd(*arguments)
    x, *mods = arguments[:9]
    needs = 0b1111001 if two else 0b0011001
    backward = (
        torch.randn_like(y), torch.randn_like(y2) if two else None, x, mean, rstd, *mods,
        None, None, None, 5, rms, 0, needs,
    )  # fmt: skip
    torch.library.opcheck(ops.norm_modulate_bwd.default, backward)


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    arguments = raw_arguments()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.norm_modulate_fwd(arguments[0].requires_grad_(), *arguments[1:])


def test_fullgraph_and_dynamic_length() -> None:
    """No graph break, and no new compilation for a new length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, shift: Tensor, scale: Tensor, rows: RowMap) -> Tensor:
        return norm_modulate(x * 2, shift, scale, rows=rows).tanh()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (50, 61, 97, 40):
        rows = RowMap.from_index(torch.arange(tokens) * 3 // tokens, 3)
        x, shift, scale = (leaf(n, 16, seed=n) for n in (tokens, 3, 3))
        upstream = randn(tokens, 16, seed=5)
        got = torch.autograd.grad(compiled(x, shift, scale, rows), (x, shift, scale), upstream)
        want = torch.autograd.grad(block(x, shift, scale, rows), (x, shift, scale), upstream)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four lengths"


def test_meta_device() -> None:
    y = norm_modulate(torch.empty(2, 5, 8, device="meta"), torch.empty(2, 8, device="meta"))
    assert y.device.type == "meta" and y.shape == (2, 5, 8)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x: expected float32"),
        ({"norm": "batch"}, ValueError, "norm: expected"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"eps": float("nan")}, ValueError, "eps: expected"),
        ({"per": "pixel"}, ValueError, "per: expected one of"),
        ({"shift": torch.zeros(3, 8)}, ValueError, r"shift: expected shape \(2, 8\), got \(3, 8\)"),
        ({"shift": torch.zeros(2, 3, 8), "per": "frame"}, ValueError, "F to divide L = 5"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \(8,\)"),
        ({"shift_table": torch.zeros(8)}, ValueError, "shift_table: expected shift"),
        ({"shift": torch.zeros(2, 8, device="meta")}, ValueError, "shift: expected device cpu"),
        ({"rows": RowMap.uniform(3, 5)}, ValueError, "rows: expected a map of 10 tokens, got 15"),
        ({"rows": RowMap.uniform(2, 5), "per": "token"}, ValueError, "per: expected None"),
        ({"law": "wrong"}, ValueError, "law: expected one of"),
        ({"law": ("xhat", "nowhere")}, ValueError, "law: expected points"),
        ({"out_dtype": torch.float64}, ValueError, "out_dtype: expected"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm_modulate(**{"x": torch.zeros(2, 5, 8), **arguments})
