"""The adaLN of the large diffusion transformers, each in its own words, against the fused ops.

One case per convention: the model's formula in plain PyTorch as its published code computes it,
and the same from our ops. In fp32 against the formula in fp64, outputs and all gradients; in bf16
the outputs are held to the formula's own rounding, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import use_backend
from tests.helpers import check, poisoned, randn, ulp
from tests.ops.adaln import Convention, Size
from tests.ops.adaln_by_rows import BY_ROWS
from tests.ops.adaln_per_sample import PER_SAMPLE

CONVENTIONS = PER_SAMPLE | BY_ROWS
Tensors = dict[str, Tensor]


def inputs(case: Convention, size: Size, dtype: torch.dtype) -> Tensors:
    """Random leaves; values that bf16 holds, so that every dtype starts from the same numbers."""
    leaves = {}
    for seed, (name, shape) in enumerate(case.shapes(size).items()):
        kept = torch.float32 if dtype is torch.bfloat16 and name in case.fp32 else dtype
        value = randn(*shape, dtype=torch.bfloat16, seed=seed).to(kept)
        leaves[name] = value.requires_grad_()
    return leaves


def run(compute: Callable[..., tuple[Tensor, ...]], leaves: Tensors, *law: Any) -> list[Tensor]:
    """Outputs, then the gradients of all leaves for random upstream gradients."""
    outputs = compute(SimpleNamespace(**leaves), *law)
    upstream = [randn(*o.shape, dtype=o.dtype, seed=90 + i) for i, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


def exact(case: Convention, leaves: Tensors, dtypes: list[torch.dtype]) -> list[Tensor]:
    """The formula in fp64, fed the upstream gradients that outputs of ``dtypes`` get."""
    double = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    outputs = case.formula(SimpleNamespace(**double))
    upstream = [
        randn(*o.shape, dtype=dtype, seed=90 + i).double()
        for i, (o, dtype) in enumerate(zip(outputs, dtypes, strict=True))
    ]
    return [*outputs, *torch.autograd.grad(outputs, list(double.values()), upstream)]


def assert_close(case: Convention, size: Size, backend: str) -> None:
    leaves = inputs(case, size, torch.float32)
    with use_backend(backend), poisoned():
        got = run(case.ours, leaves, case.law)
    count = len(got) - len(leaves)
    want = exact(case, leaves, [torch.float32] * count)
    names = [f"output {i}" for i in range(count)] + [f"d{name}" for name in leaves]
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape and g.dtype == torch.float32, name
        worst = (g - w).abs().max().item() / w.abs().max().item()
        assert worst < 2e-6, f"{name}: relative error {worst:.1e}"


@pytest.mark.parametrize("name", CONVENTIONS)
def test_formula_in_fp32(name: str) -> None:
    assert_close(CONVENTIONS[name], Size(2, 3, 8, 96), "native")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_formula_in_fp32_triton(name: str) -> None:
    assert_close(CONVENTIONS[name], Size(1, 2, 3, 16), "triton")


@pytest.mark.parametrize("name", CONVENTIONS)
def test_rounding_in_bf16(name: str) -> None:
    case = CONVENTIONS[name]
    leaves = inputs(case, Size(2, 4, 24, 256), torch.bfloat16)
    eager = run(case.formula, leaves)
    count = len(eager) - len(leaves)
    with use_backend("native"):
        got = run(case.ours, leaves, case.law)
        once = case.ours(SimpleNamespace(**leaves), "fp32_once")
    want = exact(case, leaves, [o.dtype for o in eager[:count]])
    largest = max(x.abs().max().item() for x in (*eager[:count], *leaves.values()))
    shares = []
    for i in range(count):
        assert got[i].dtype == eager[i].dtype, f"output {i}"
        if got[i].dtype is torch.float32:  # of an fp32 stream: nothing is rounded to bf16
            torch.testing.assert_close(got[i], eager[i], rtol=1e-6, atol=1e-6)
            continue
        same = (got[i] == eager[i]).float().mean().item()
        assert same >= 0.999, f"output {i}: {same:.3%} bit-equal"
        worst = (got[i].double() - eager[i].double()).abs().max().item()
        assert worst <= ulp(torch.tensor(largest), torch.bfloat16).item(), f"output {i}"
        shares.append((once[i] == eager[i]).float().mean().item())
    if case.law != "fp32_once":
        assert min(shares) < 0.98, f"the law makes no difference: {shares}"
    for leaf, g, w, low in zip(leaves, got[count:], want[count:], eager[count:], strict=True):
        assert g.dtype == low.dtype, leaf
        check(g, w, low, grad=True, name=f"d{leaf}")
