"""The packing planner: an epoch of 100,000 clips for 8 ranks, C++ against its NumPy fallback.

It runs on the host whatever the device is. ``plain`` is the fallback, which gives the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from sora_kernels import _ext
from sora_kernels.planner import plan
from sora_kernels.planner.bins import Implementation

from .registry import Case, Context, Inputs, Provider, Run, Unavailable

BUDGET = 32_768
WORLD = 8


def inputs(count: int, device: torch.device) -> Inputs:
    """Tokens of clips with few and many frames at all sizes and aspect ratios."""
    rng = np.random.default_rng(0)
    frames = rng.choice([1, 2, 5, 9, 13, 21], count)
    tokens = frames * rng.integers(12, 40, count) * rng.integers(12, 40, count)
    return {"lengths": tokens.clip(1, BUDGET)}


def provider(implementation: Implementation) -> Provider:
    def build(inputs: Inputs) -> Run:
        if implementation == "native" and _ext.host is None:
            raise Unavailable(_ext.missing["_host"])

        def run() -> object:
            made = plan(inputs["lengths"], BUDGET, world=WORLD, implementation=implementation)
            return torch.from_numpy(made.clips), torch.from_numpy(made.offsets)

        return run

    return build


def cases(context: Context) -> Iterable[Case]:
    for count in context.pick(quick=(100_000,), full=(10_000, 100_000, 1_000_000)):
        yield Case(
            suite="ops",
            op="planner",
            mode="fwd",
            case=f"{count} clips",
            dtype="fp32",
            bytes=16 * count,
            flops=0,
            inputs=partial(inputs, count),
            providers={"sora_kernels": provider("native"), "plain": provider("numpy")},
            tolerance=0.0,
            units={"clips": count},
        )
