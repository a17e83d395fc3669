"""Windows by flash-attn 4's block sparsity on a GPU: it gives what our kernel gives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.ops.packed_attention import prepare_window
from sora_kernels.ops.packed_attention.libraries import OWN
from sora_kernels.ops.windowed_attention import flash_attn_4
from sora_kernels.ops.windowed_attention.block_sparse import block_tensors
from sora_kernels.packing import Capacity
from tests.gpu.common import (
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
from tests.helpers import randn
from tests.ops import flash_attn_4_stand_in as stand_in

pytestmark = needs_gpu


def by_library(pack: sk.PackedLayout, window: sk.Window, **options: Any) -> Any:
    """Attention by the library; the test is skipped, with the reason, where it cannot run."""
    options = {"deterministic": False, "return_lse": True} | options

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        try:
            return sk.packed_attention(
                q, k, v, pack, window=window, library="flash_attn_4", **options
            )
        except ValueError as error:
            if "cannot run this call" not in str(error):
                raise
            pytest.skip(str(error))

    return call


@pytest.mark.parametrize("shape", [(2, 2, 64), (4, 2, 72), (2, 2, 128)], ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_equals_dense_attention_under_a_mask(name: str, shape: tuple[int, int, int]) -> None:
    check_windows(by_library, name, shape, torch.bfloat16)


def test_a_deterministic_backward_gives_the_same_bits() -> None:
    pack = layout()
    tensors = inputs(pack.num_tokens, 4, 4, 128, torch.bfloat16)
    attention = by_library(pack, WINDOWS["sink"], deterministic=True)
    check_same_bits(lambda: run(attention, tensors, torch.bfloat16))


@pytest.mark.parametrize("name", WINDOWS)
def test_lists_on_the_gpu_are_those_of_the_cpu(name: str) -> None:
    for block in ((128, 128), (256, 128)):
        made = [
            block_tensors(sk.PackedLayout(PACK, order="tile", device=device), WINDOWS[name], block)
            for device in ("cpu", "cuda")
        ]
        for a, b in zip(*[[m.places, *m.by_query, *m.by_key, *m[3:]] for m in made], strict=True):
            assert torch.equal(a, b.cpu())


def test_building_the_lists_never_synchronises() -> None:
    block_tensors(layout(), WINDOWS["sink"], (128, 128))  # loads kernels
    pack = layout()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = block_tensors(pack, WINDOWS["sink"], (128, 128))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.by_query.partial_count.sum() > 0


def test_a_graph_captured_with_one_pack_replays_with_another() -> None:
    window, capacity = WINDOWS["causal-sink"], Capacity(4096, segments=8)
    other_parts = [[sk.Grid(3, 33, 20, tile=(2, 8, 8)), sk.Text(40)], [sk.Text(5)]]
    pack = layout(capacity=capacity)
    q, k, v = inputs(pack.num_tokens, 2, 2, 64, torch.bfloat16)
    dout = randn(*q.shape, dtype=torch.bfloat16, seed=2).cuda()

    def step(pack: sk.PackedLayout) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = by_library(pack, window, return_lse=False)(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    prepare_window(pack, window, q, library="flash_attn_4")
    graph, results = captured(lambda: step(pack))
    for parts in (PACK, other_parts):
        pack.copy_(layout(parts, capacity))
        graph.replay()
        want = sk.packed_attention(q, k, v, layout(parts, capacity), window=window, library=OWN)
        error = (results[0].float() - want.float()).norm() / want.float().norm()
        assert error < 0.02, f"relative error {error:.4f}"


def test_the_installed_library_has_the_signatures_this_was_written_for() -> None:
    interface = pytest.importorskip(
        "flash_attn.cute.interface", reason="flash_attn.cute is not installed"
    )
    lists = pytest.importorskip("flash_attn.cute.block_sparsity")
    forward, backward = stand_in.make(flash_attn_4.block_of((9, 0)), [])
    for mine, theirs in (
        (forward, interface._flash_attn_fwd), (backward, interface._flash_attn_bwd),
    ):  # fmt: skip
        names = inspect.signature(mine).parameters
        assert names.keys() <= inspect.signature(theirs).parameters.keys()
    fields = set(lists.BlockSparseTensorsTorch._fields)
    assert set(stand_in.BlockSparseTensorsTorch._fields) - {"spt"} <= fields
    assert fields & {"spt", "dq_kv_order"}
