"""docs/recipes.md: every "after" computes what its "before" does, forward and backward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import randn

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
DIM, HEADS = 32, 4


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the code of the page defines."""
    names: dict[str, Any] = {"__name__": "recipes"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def angles(tokens: int) -> list[Tensor]:
    x = randn(tokens, DIM // HEADS // 2, seed=9)
    return [x.cos(), x.sin()]


CALLS: dict[str, list[Any]] = {
    "DiTBlock": [randn(2, 6, DIM), randn(2, DIM, seed=1)],
    "WanBlock": [randn(2, 12, DIM), randn(2, 6, DIM, seed=1), (2, 3, 2)],
    "JointAttention": [randn(2, 6, DIM), randn(2, 3, DIM, seed=1), *angles(9)],
}


@pytest.mark.parametrize("name", CALLS)
def test_before_and_after_agree(page: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    before: nn.Module = page[name](DIM, HEADS)
    after: nn.Module = page[f"Fast{name}"](DIM, HEADS)
    for p in before.parameters():
        nn.init.normal_(p, std=0.3)
    after.load_state_dict(before.state_dict())

    def run(module: nn.Module) -> list[Tensor]:
        args = [
            x.clone().requires_grad_() if isinstance(x, Tensor) and i < 2 else x
            for i, x in enumerate(CALLS[name])
        ]
        found = module(*args)
        outputs = list(found) if isinstance(found, tuple) else [found]
        leaves = [*args[:2], *module.parameters()]
        upstream = [randn(*y.shape, seed=20 + i) for i, y in enumerate(outputs)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    for mine, theirs in zip(run(after), run(before), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


def test_every_recipe_is_tested(page: dict[str, Any]) -> None:
    pairs = {name.removeprefix("Fast") for name in page if name.startswith("Fast")}
    assert pairs - {"WanSelfAttention"} == set(CALLS)
