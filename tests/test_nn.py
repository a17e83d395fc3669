"""The norms of `sora_kernels.nn` are torch.nn's: same checkpoint, same numbers, one more use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sora_kernels import nn as skn
from tests.helpers import randn

PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (skn.LayerNorm, nn.LayerNorm, {}),
    (skn.LayerNorm, nn.LayerNorm, {"elementwise_affine": False, "eps": 1e-6}),
    (skn.LayerNorm, nn.LayerNorm, {"bias": False}),
    (skn.RMSNorm, nn.RMSNorm, {}),
    (skn.RMSNorm, nn.RMSNorm, {"eps": 1e-6}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_same_checkpoint_same_numbers(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    mine, plain = ours(24, **options), theirs(24, **options)
    for p in plain.parameters():
        nn.init.normal_(p)
    mine.load_state_dict(plain.state_dict())
    x = randn(2, 5, 24).requires_grad_()
    leaves = [x, *plain.parameters()], [x, *mine.parameters()]
    dy = randn(2, 5, 24, seed=1)
    torch.testing.assert_close(mine(x), plain(x))
    for a, b in zip(
        torch.autograd.grad(plain(x), leaves[0], dy),
        torch.autograd.grad(mine(x), leaves[1], dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    shift, scale = randn(2, 24, seed=2), randn(2, 24, seed=3)
    expected = plain(x) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(mine(x, shift, scale), expected)


def test_several_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="normalized_shape: expected one dimension"):
        skn.LayerNorm((3, 4))(randn(2, 3, 4))
