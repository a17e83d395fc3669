"""The cases of attention: what they compare, and that the peers compute what they stand for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import bench_packed_attention, bench_windowed_attention
from benchmarks.bench_windowed_attention import Flex, Shape, peers_of
from benchmarks.registry import Context, Unavailable
from sora_kernels import Window
from sora_kernels.ops.packed_attention.libraries import LIBRARIES
from tests.helpers import randn
from tests.ops.windowed import tile_mask

SMALL = Shape(
    "small", ((9, (3, 7, 9), (2, 4, 4)), (5, (1, 6, 6), (1, 4, 4))), 2, 16,
    Window((2, 1, 3), causal=True, sink=1),
)  # fmt: skip


@pytest.mark.parametrize(("device", "quick"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_dense_varlen_and_windowed_calls_meet_every_peer(device: str, quick: bool) -> None:
    """Peers that cannot run are listed too: each says itself why. Declaring needs no GPU."""
    context = Context(device, quick)
    dense = list(bench_packed_attention.cases(context))
    windowed = list(bench_windowed_attention.cases(context))
    names = Counter(case.name for case in (*dense, *windowed))
    assert max(names.values()) == 1
    assert {case.op for case in (*dense, *windowed)} == {"packed_attention"}
    assert {case.case.split()[0] for case in dense} >= {"one", "mixed"}
    for case in (*dense, *(c for c in windowed if c.case.startswith("no window"))):
        assert case.providers.keys() >= {"sora_kernels", "plain", *LIBRARIES}
    found = [case for case in windowed if case.case.startswith("window")]
    assert {case.mode for case in found} == {"fwd", "bwd"}
    for case in found:
        assert case.providers.keys() >= {"sora_kernels", "plain", "flash_attn_4", "flex_flash"}
    if not quick:
        shapes = bench_windowed_attention.CUDA if device == "cuda" else bench_windowed_attention.CPU
        flex = {case.case for case in found if "flex_attention" in case.providers}
        assert flex == {shape.case for shape in shapes if shape.whole}
        dtypes = {"bf16"} if device == "cuda" else {"fp32", "bf16"}
        assert {case.dtype for case in found} == dtypes
        assert len(found) == 2 * len(dtypes) * len({case.case for case in found})


def test_flex_attention_gets_the_mask_and_our_lists() -> None:
    layout = SMALL.layout("cpu")
    flex = Flex(SMALL.window)
    tokens = torch.arange(layout.num_tokens)
    blocks = flex.block_mask(layout, (128, 128)).to_dense()[0, 0]
    want = tile_mask(layout, SMALL.window)
    assert torch.equal(flex.rule(layout)(0, 0, tokens[:, None], tokens), want)
    n = layout.num_tokens
    padded = torch.nn.functional.pad(want, (0, -n % 128, 0, -n % 128))
    visited = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert torch.equal(blocks.bool(), visited)


@pytest.mark.parametrize("name", ["flash_attn_4", "flex_flash"])
def test_peers_say_why_they_cannot_run(name: str) -> None:
    layout = SMALL.layout("cpu")
    q: Any = randn(layout.num_tokens, 2, 16)
    with pytest.raises(Unavailable, match="needs an NVIDIA GPU"):
        peers_of(SMALL, quick=True)[name](q, q, q, layout, None)
