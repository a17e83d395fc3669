"""PackedLayout on a GPU: nothing waits for the device, and a captured graph serves another pack."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.packing import Capacity, Grid, PackedLayout, Text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CAPACITY = Capacity(2000, segments=20)
FIRST = [[Text(5), Grid(3, 8, 8)]]
SECOND = [[Grid(2, 9, 11, origin=(3, 0, 0))], [Text(40)], [Grid(1, 20, 20)]]


def make(segments: list) -> PackedLayout:
    layout = PackedLayout(segments, order="tile", device="cuda", capacity=CAPACITY)
    layout.rope((8, 4, 4))
    layout.work(128)
    return layout


def test_building_and_copying_never_synchronise() -> None:
    make(FIRST)  # the first use of a device may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout, other = make(FIRST), make(SECOND)
        layout.copy_(other)
        shard = layout.shard(1, 2)
        rows = shard.segment_rows.num_tokens + shard.part_rows.num_tokens
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows == 2000
    assert torch.equal(layout.cu_seqlens, other.cu_seqlens)
    assert layout.cu_seqlens.tolist()[:4] == [0, 198, 238, 638]


def test_a_graph_captured_with_one_pack_replays_with_another() -> None:
    layout, other = make(FIRST), make(SECOND)
    rope = layout.rope((8, 4, 4))
    rows = torch.randn(layout.num_segments, 16, device="cuda")
    x = torch.randn(layout.num_tokens, 16, device="cuda")

    def use(pack: PackedLayout) -> torch.Tensor:
        cos, sin = pack.rope((8, 4, 4)).dense()
        return x * pack.segment_rows.expand(rows) + torch.cat([cos, sin], dim=1)

    use(layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = use(layout)
    graph.replay()
    torch.testing.assert_close(result, use(make(FIRST)))
    layout.copy_(other)
    graph.replay()
    torch.testing.assert_close(result, use(other))
    assert rope is layout.rope((8, 4, 4))
