"""Windows of tiles on a GPU: accuracy against a masked dense call, bits, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.packed_attention import prepare_window
from sora_kernels.packing import Capacity
from tests.gpu.common import (
    DEVICE,
    NAMES,
    PACK,
    WINDOWS,
    captured,
    check_same_bits,
    check_windows,
    inputs,
    layout,
    needs_gpu,
    run,
)
from tests.helpers import check, randn
from tests.ops.windowed import tile_mask

pytestmark = needs_gpu


def attention(pack: sk.PackedLayout, window: sk.Window) -> Any:
    return lambda q, k, v: sk.packed_attention(q, k, v, pack, window=window, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 64), (4, 2, 72), (2, 1, 96), (2, 2, 128)], ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_equals_dense_attention_under_a_mask(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check_windows(attention, name, shape, dtype)
    assert "windowed_attention on cuda: triton" in sk.explain()


@pytest.mark.parametrize("name", ["clamped", "causal-sink"])
def test_equals_scaled_dot_product_attention_at_a_mid_size(name: str) -> None:
    """A video of 3,920 tokens with text, heads of 128: several blocks per tile and per run."""
    parts = [[sk.Text(120), sk.Grid(7, 20, 28, tile=(3, 8, 16))]]
    pack, window = layout(parts), WINDOWS[name]
    seen = tile_mask(sk.PackedLayout(parts, order="tile"), window).to(DEVICE)
    q, k, v = (x.detach() for x in inputs(pack.num_tokens, 2, 2, 128, torch.bfloat16))
    dout = randn(*q.shape, dtype=torch.bfloat16, seed=2).to(DEVICE)

    def dense(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in leaves), attn_mask=seen
        )[0].transpose(0, 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sk.packed_attention(*leaves, pack, window=window)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for label, a, b, low in zip(
        ("out", "dq", "dk", "dv"), got, dense(torch.float32), dense(torch.bfloat16), strict=True
    ):
        check(a, b, low, grad=label.startswith("d"), name=label)


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_every_run_gives_the_same_bits(dim: int) -> None:
    pack = layout()
    tensors = inputs(pack.num_tokens, 4, 2, dim, torch.bfloat16)
    check_same_bits(lambda: run(attention(pack, WINDOWS["sink"]), tensors, torch.bfloat16))


def test_a_segment_in_a_pack_has_the_bits_of_the_segment_alone() -> None:
    pack, window = layout(), WINDOWS["clamped"]
    tensors = inputs(pack.num_tokens, 2, 2, 64, torch.bfloat16)
    dout = randn(pack.num_tokens, 2, 64, dtype=torch.bfloat16, seed=2).to(DEVICE)

    def call(pack: sk.PackedLayout, rows: slice) -> list[Tensor]:
        leaves = [x[rows].detach().clone().requires_grad_() for x in tensors]
        out, lse = attention(pack, window)(*leaves)
        return [out.detach(), lse.detach().mT, *torch.autograd.grad(out, leaves, dout[rows])]

    together = call(pack, slice(None))
    start = 0
    for parts, length in zip(PACK, pack.seqlens, strict=True):
        rows = slice(start, start + length)
        for label, a, b in zip(NAMES, together, call(layout([parts]), rows), strict=True):
            assert torch.equal(a[rows], b), label
        start += length


def test_a_graph_captured_with_one_pack_replays_with_another() -> None:
    """Forward and backward; the layout's tensors change under the graph."""
    window, capacity = WINDOWS["causal-sink"], Capacity(4096, segments=8)
    other_parts = [[sk.Grid(3, 33, 20, tile=(2, 8, 8)), sk.Text(40)], [sk.Text(5)]]
    pack, other = layout(capacity=capacity), layout(other_parts, capacity)
    q, k, v = inputs(pack.num_tokens, 2, 1, 64, torch.bfloat16)
    dout = randn(*q.shape, dtype=torch.bfloat16, seed=2).to(DEVICE)
    prepare_window(pack, window, q)

    def step(pack: sk.PackedLayout) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = sk.packed_attention(*leaves, pack, window=window)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    graph, results = captured(lambda: step(pack))
    for parts in (PACK, other_parts):
        pack.copy_(layout(parts, capacity))
        graph.replay()
        for got, want in zip(results, step(layout(parts, capacity)), strict=True):
            assert torch.equal(got, want)
    real = other.num_tokens - sum(other.seqlens[2:])
    alone = sk.packed_attention(q[:real], k[:real], v[:real], layout(other_parts), window=window)
    assert torch.equal(results[0][:real], alone)


def test_a_call_never_synchronises() -> None:
    pack, window = layout(), WINDOWS["clamped"]
    tensors = inputs(pack.num_tokens, 2, 2, 64, torch.bfloat16)
    run(attention(pack, window), tensors, torch.bfloat16)  # compiles
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.ones_like(leaves[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sk.packed_attention(*leaves, layout(), window=window)
        grads = torch.autograd.grad(out, leaves, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for x in grads)
