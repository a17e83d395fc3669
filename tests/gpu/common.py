"""What GPU tests share: when they run, windows and their packs, the capture of a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.backend import interpreting
from sora_kernels.ops.windowed_attention.reference import windowed_attention_reference
from tests.helpers import check, poisoned, randn
from tests.ops.windowed import masked_attention, tile_mask

T = TypeVar("T")
DEVICE = "cuda"
NAMES = ("out", "lse", "dq", "dk", "dv")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(interpreting(), reason="set TRITON_INTERPRET=0 to run kernels on the GPU"),
]


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `step` and its results, which every replay overwrites. One call before the
    capture, on another stream, loads kernels and libraries."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


# Partial tiles on every axis, text before, given frames after, an image with flat tiles.
PACK = [
    [sk.Text(77), sk.Grid(5, 12, 20, tile=(2, 8, 8)), sk.Grid(1, 12, 20, given=True)],
    [sk.Grid(1, 24, 20, tile=(1, 16, 16)), sk.Text(9)],
    [sk.Text(130)],
    [sk.Grid(5, 9, 11)],
]
WINDOWS = {
    "clamped": sk.Window((3, 1, 3)),
    "truncated": sk.Window((1, 3, 3), "truncate"),
    "causal-sink": sk.Window((2, 1, None), causal=True, sink=1),
    "sink": sk.Window((1, 3, 1), sink=2),
    "one-tile": sk.Window((1, 1, 1)),
    "wider-than-the-grid": sk.Window((9, 9, 9)),
}


@functools.cache
def pack_mask(name: str) -> Tensor:
    return tile_mask(sk.PackedLayout(PACK, order="tile"), WINDOWS[name])


def layout(parts: Any = PACK, capacity: Any = None) -> sk.PackedLayout:
    return sk.PackedLayout(parts, order="tile", device=DEVICE, capacity=capacity)


def inputs(n: int, heads: int, heads_k: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v: views of one packed QKV where the heads allow it."""
    if heads == heads_k:
        return list(randn(n, 3, heads, dim, dtype=dtype).to(DEVICE).unbind(1))
    q = randn(n, heads, dim, dtype=dtype).to(DEVICE)
    return [q, *randn(n, 2, heads_k, dim, dtype=dtype, seed=1).to(DEVICE).unbind(1)]


def run(fn: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of `fn(q, k, v)` for seeded upstream gradients of both results."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    out, lse = fn(*leaves)
    dout = randn(*out.shape, dtype=tensors[0].dtype, seed=2).to(DEVICE, dtype)
    dlse = randn(*lse.shape, seed=3).to(DEVICE, lse.dtype)
    return [
        out.detach(),
        lse.detach(),
        *torch.autograd.grad((out, lse), leaves, (dout, dlse)),
    ]


def check_windows(
    attention: Callable[[sk.PackedLayout, sk.Window], Any],
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """`attention(pack, window)(q, k, v)` under a window against fp64 attention under a mask."""
    window, pack = WINDOWS[name], layout()
    tensors = inputs(pack.num_tokens, *shape, dtype)
    seen, scale = pack_mask(name).to(DEVICE), shape[-1] ** -0.5
    with poisoned():
        got = run(attention(pack, window), tensors, dtype)
    exact = run(lambda q, k, v: masked_attention(q, k, v, seen, scale), tensors, torch.float64)
    lowp = run(
        lambda q, k, v: windowed_attention_reference(q, k, v, pack, window, scale), tensors, dtype
    )
    for label, *results in zip(NAMES, got, exact, lowp, strict=True):
        check(*results, grad=label.startswith("d"), name=label)


def check_same_bits(call: Callable[[], list[Tensor]]) -> None:
    """Three calls of `run` give the same bits."""
    first, *others = [call() for _ in range(3)]
    for again in others:
        for label, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), label
