"""Attention by tensor descriptors (TMA) on a GPU: it runs, and gives the bits of plain pointers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.packed_attention.config import choose_config, forced_descriptors
from tests.gpu.common import DEVICE, NAMES, captured, needs_gpu
from tests.helpers import poisoned, randn

WINDOW = sk.Window((1, 3, 1), sink=1)
# Segments end inside blocks, ranges of the window inside blocks and inside tiles.
PARTS: list[list[Any]] = [
    [sk.Text(77), sk.Grid(5, 12, 20, tile=(2, 8, 8)), sk.Grid(1, 12, 20, given=True)],
    [sk.Grid(1, 24, 20, tile=(1, 16, 16)), sk.Text(9)],
    [sk.Text(130)],
]

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="the TMA unit came with compute capability 9.0",
    ),
]


def call(layout: sk.PackedLayout, window: sk.Window | None, causal: bool = False) -> Callable:
    return lambda q, k, v: sk.packed_attention(
        q, k, v, layout, window=window, causal=causal, return_lse=True,
        library=None if window else "own",
    )  # fmt: skip


def run(fn: Any, tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    """out, lse `[N, H]`, dq, dk, dv of `fn(q, k, v)`."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with poisoned():
        out, lse = fn(*leaves)
        grads = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), lse.detach().mT, *grads]


def pack() -> sk.PackedLayout:
    return sk.PackedLayout(PARTS, order="tile", device=DEVICE)


def inputs(n: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    qkv = randn(n, 3, heads, dim, dtype=dtype).to(DEVICE)
    return list(qkv.unbind(1)), randn(n, heads, dim, dtype=dtype, seed=1).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("mode", ["dense", "causal", "window"])
def test_the_bits_are_those_of_pointers(mode: str, dim: int, dtype: torch.dtype) -> None:
    layout = pack()
    tensors, dout = inputs(layout.num_tokens, 3, dim, dtype)
    fn = call(layout, WINDOW if mode == "window" else None, mode == "causal")
    with forced_descriptors(False):
        want = run(fn, tensors, dout)
    with forced_descriptors(True):  # also where a launch keeps its pointers by default
        got = run(fn, tensors, dout)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b), name


def ptx_of(kernel: Any) -> list[str]:
    """What was compiled of a kernel on this device in this process."""
    cache = kernel.device_caches[torch.cuda.current_device()][0]
    return [compiled.asm["ptx"] for compiled in cache.values()]


@pytest.mark.parametrize("window", [None, WINDOW], ids=["dense", "window"])
def test_an_aligned_call_reads_by_the_tma_unit(window: sk.Window | None) -> None:
    from sora_kernels.ops.packed_attention import kernels, kernels_bwd
    from sora_kernels.ops.windowed_attention import kernels as windowed
    from sora_kernels.ops.windowed_attention import kernels_bwd as windowed_bwd

    layout = pack()
    run(call(layout, window), *inputs(layout.num_tokens, 2, 64, torch.bfloat16))
    config = choose_config(64, torch.bfloat16, torch.cuda.get_device_capability())
    launched = {
        "fwd": windowed._windowed_attention_fwd_kernel,
        "dq": windowed_bwd._windowed_attention_bwd_kernel_dq,
        "dkv": windowed_bwd._windowed_attention_bwd_kernel_dkv,
    } if window else {
        "fwd": kernels._packed_attention_fwd_kernel,
        "dq": kernels_bwd._packed_attention_bwd_kernel_dq,
        "dkv": kernels_bwd._packed_attention_bwd_kernel_dkv,
    }  # fmt: skip
    assert config.fwd.descriptors
    for kind, kernel in launched.items():
        found = any("cp.async.bulk.tensor" in ptx for ptx in ptx_of(kernel))
        assert found or not getattr(config, kind).descriptors, kind


@pytest.mark.parametrize("window", [None, WINDOW], ids=["dense", "window"])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_what_a_neighbouring_segment_holds_does_not_matter(
    dim: int, window: sk.Window | None
) -> None:
    layout = pack()
    tensors, dout = inputs(layout.num_tokens, 2, dim, torch.bfloat16)
    start, stop = layout.seqlens[0], layout.seqlens[0] + layout.seqlens[1]
    alone = sk.PackedLayout(PARTS[1:2], order="tile", device=DEVICE)
    with forced_descriptors(True):
        want = run(call(alone, window), [x[start:stop] for x in tensors], dout[start:stop])
        for x in (*tensors, dout):
            x[:start] = float("nan")
            x[stop:] = float("nan")
        got = run(call(layout, window), tensors, dout)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a[start:stop], b), name


def test_what_no_descriptor_can_say_is_read_by_pointers() -> None:
    """Heads of 100: rows of 200 bytes."""
    layout = pack()
    tensors, dout = inputs(layout.num_tokens, 1, 100, torch.bfloat16)
    got = run(call(layout, None), tensors, dout)
    with forced_descriptors(False):
        want = run(call(layout, None), tensors, dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with forced_descriptors(True), pytest.raises(ValueError, match="multiples of 16 bytes"):
        run(call(layout, None), tensors, dout)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["dense", "window"])
def test_a_cuda_graph_holds_the_descriptors(window: sk.Window | None) -> None:
    layout = pack()
    tensors, dout = inputs(layout.num_tokens, 2, 64, torch.bfloat16)
    fn = call(layout, window)
    with torch.no_grad():
        graph, (out, lse) = captured(lambda: fn(*tensors))
    for x in tensors:
        x.copy_(x.flip(0))
    graph.replay()
    want = run(fn, tensors, dout)
    assert torch.equal(out, want[0])
    assert torch.equal(lse.mT, want[1])


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_offsets_beyond_32_bits(descriptors: bool) -> None:
    """q, k, v as views of one tensor of 6.4e9 numbers, cut into segments of 64 tokens."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip("needs 60 GiB of memory")
    n, heads, dim, tail = 700_032, 24, 128, 256
    qkv = torch.zeros(n, 3, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.zeros(n, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    qkv[-tail:] = randn(tail, 3, heads, dim, dtype=torch.bfloat16).to(DEVICE)
    dout[-tail:] = randn(tail, heads, dim, dtype=torch.bfloat16, seed=1).to(DEVICE)
    far = sk.PackedLayout([[sk.Text(64)]] * (n // 64), device=DEVICE)
    near = sk.PackedLayout([[sk.Text(64)]] * (tail // 64), device=DEVICE)
    with forced_descriptors(descriptors):
        got = run(call(far, None), list(qkv.unbind(1)), dout)
        want = run(call(near, None), list(qkv[-tail:].unbind(1)), dout[-tail:])
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a[-tail:], b), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("window", [None, WINDOW], ids=["dense", "window"])
def test_a_call_runs_on_the_device_of_its_tensors(window: sk.Window | None) -> None:
    layout = pack()
    tensors, dout = inputs(layout.num_tokens, 2, 64, torch.bfloat16)
    want = run(call(layout, window), tensors, dout)
    there = torch.device("cuda", 1)
    other = sk.PackedLayout(PARTS, order="tile", device=there)
    assert torch.cuda.current_device() == 0
    got = run(call(other, window), [x.to(there) for x in tensors], dout.to(there))
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.device == there and torch.equal(a.to(b.device), b), name
