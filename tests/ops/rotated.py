"""What the tests of qk_norm_rope share: packs, and rotations by their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Rope, Text
from tests.helpers import randn

AXES = {32: (8, 12, 12), 64: (16, 24, 24), 72: (24, 24, 24), 96: (32, 32, 32), 128: (44, 42, 42)}
PACKS = {
    1: [[Grid(1, 1, 1)]],
    12: [[Text(2), Grid(1, 2, 5)]],
    63: [[Text(7), Grid(2, 4, 7)]],
    100: [[Text(4), Grid(3, 4, 5)], [Grid(1, 6, 6, origin=(900.0, 7.0, 3.0))]],
}


def make_rope(tokens: int, axes: tuple[int, int, int]) -> Rope:
    return PackedLayout(PACKS[tokens]).rope(axes, theta=100.0)


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()
