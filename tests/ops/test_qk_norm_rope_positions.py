"""Positions computed in the kernel from a layout's grids: the bits of an index per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Rope, Text, qk_norm_rope, use_backend
from sora_kernels.ops.qk_norm_rope import qk_norm_rope_joint
from sora_kernels.packing import Capacity
from sora_kernels.packing.rope import GridPositions, token_coordinates
from tests.helpers import poisoned, randn

BACKENDS = ("native", "triton")
ORDERS = ("raster", "tile")
AXES = {40: (8, 12, 20), 64: (16, 24, 24)}  # the general loops of the CPU, and its fast path


def segments() -> list[list[Text | Grid]]:
    """Text first, last and empty; an image, videos, partial tiles, a context before a clip."""
    return [
        [Text(5), Grid(3, 4, 5, tile=(2, 3, 2))],
        [Text(0), Grid(1, 3, 7, origin=(0.5, -2.25, 0), scale=(1, 0.5, 2), tile=(1, 2, 3))],
        [],
        [Grid(1, 2, 3, given=True), Grid(2, 2, 3, origin=(1, 0, 0), scale=(0.8, 1, 1)), Text(4)],
    ]


def indexed(rope: Rope, layout: PackedLayout) -> Rope:
    """The same tables, and rows found by looking for the position."""
    row_of = {x: i for i, x in reversed(list(enumerate(layout._host.positions().tolist())))}
    coordinates, part_of = layout.coordinates().tolist(), layout.part_of_token.tolist()
    parts = [*layout.parts, *[Text(0)] * (layout.num_parts - len(layout.parts))]
    index = []
    for n, part in enumerate(parts[p] for p in part_of):
        where = [0.0, 0.0, 0.0]
        if isinstance(part, Grid):
            where = [part.origin[a] + part.scale[a] * coordinates[n][a] for a in range(3)]
        index.append([row_of[x] for x in where])
    return Rope(rope.cos, rope.sin, torch.tensor(index, dtype=torch.int32), rope.axes)


def run(rope: Rope, shape: tuple[int, ...], width: int = 64, **options: Any) -> list[Tensor]:
    q, k = (randn(*shape, heads, width, seed=heads).requires_grad_() for heads in (2, 1))
    weight = randn(width, seed=5).requires_grad_()
    with poisoned():
        outputs = qk_norm_rope(q, k, weight, weight, rope, **options)
        upstream = [randn(*y.shape, seed=9) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, (q, k, weight), upstream)]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# --- coordinates --------------------------------------------------------------------------------

side = st.integers(1, 9)
grids = st.tuples(side, side, side, st.tuples(side, side, side)).map(
    lambda g: Grid(*g[:3], tile=g[3])
)
packs = st.lists(st.lists(st.one_of(st.integers(0, 5).map(Text), grids), max_size=3), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(packs, st.sampled_from(ORDERS))
def test_closed_form_against_the_order_of_tokens(segments: Any, order: Any) -> None:
    layout = PackedLayout(segments, order=order)
    positions = layout.rope((2, 2, 2)).positions
    assert isinstance(positions, GridPositions)
    # Default origins and scales: the row is the coordinate.
    assert torch.equal(positions.rows(), layout.coordinates())


def test_closed_form_of_large_grids() -> None:
    """Close to 2**31 tokens: no intermediate value overflows."""
    size = (16, 11_000, 12_000)
    tile = (5, 7000, 129)
    count = size[0] * size[1] * size[2]
    assert count < 2**31
    offset = torch.tensor([0, 1, count // 3, count - 2, count - 1], dtype=torch.int32)
    sizes, tiles = ([torch.full((5,), n, dtype=torch.int32) for n in x] for x in (size, tile))
    for kind in (None, tiles):
        found = token_coordinates(offset, sizes, kind)
        again = token_coordinates(
            offset.long(), [n.long() for n in sizes], kind and [n.long() for n in kind]
        )
        assert torch.equal(found.long(), again)
        assert found[0].tolist() == [0, 0, 0] and found[-1].tolist() == [n - 1 for n in size]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(pack=packs, order=st.sampled_from(ORDERS))
def test_kernels_find_the_tokens_of_any_pack(backend: str, pack: Any, order: Any) -> None:
    layout = PackedLayout(pack, order=order)
    rope = layout.rope((2, 4, 2))
    index = replace(rope, positions=layout.coordinates())
    x = randn(layout.num_tokens, 1, 8, seed=1)
    with use_backend(backend):
        mine, theirs = (qk_norm_rope(x, x, rope=r, norm=None)[0] for r in (rope, index))
    assert torch.equal(mine, theirs)


# --- the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [40, 64])
def test_same_bits_as_an_index(backend: str, order: Any, width: int) -> None:
    layout = PackedLayout(segments(), order=order)
    rope = layout.rope(AXES[width], ntk=2.0, interpolation=(1.0, 0.5, 1.0))
    index = indexed(rope, layout)
    assert all(torch.equal(*pair) for pair in zip(rope.dense(), index.dense(), strict=True))
    for pairing in ("interleaved", "half")[backend == "triton" :]:
        with use_backend(backend):
            mine, theirs = (run(r, (layout.num_tokens,), width, pairing=pairing)
                            for r in (rope, index))  # fmt: skip
        assert_same(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_slices_and_shards(backend: str, order: Any) -> None:
    layout = PackedLayout(segments(), order=order)
    rope = layout.rope(AXES[64])
    x = randn(layout.num_tokens, 1, 64, seed=1)
    with use_backend(backend):
        whole = qk_norm_rope(x, x, rope=rope)[0]
        for start, stop in ((0, 3), (4, 60), (61, 61), (70, layout.num_tokens)):
            part = rope.slice(2, layout.num_tokens).slice(start, stop)
            y = x[start + 2 : stop + 2]
            part = part.slice(0, len(y))
            assert torch.equal(qk_norm_rope(y, y, rope=part)[0], whole[start + 2 : stop + 2])
        pieces = []
        for shard in (layout.shard(rank, 3) for rank in range(3)):
            y = shard.take(x)
            pieces.append(qk_norm_rope(y, y, rope=shard.rope(AXES[64]))[0])
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_padded_with_tokens_that_do_not_turn(backend: str, order: Any) -> None:
    rope = PackedLayout(segments(), order=order).rope(AXES[64])
    padded = rope.slice(3, 50).padded(before=4, after=2)
    assert padded.cos is rope.cos and padded.num_tokens == 53
    x = randn(53, 1, 64, seed=1)
    with use_backend(backend):
        y = qk_norm_rope(x, x, rope=padded, norm=None)[0]
        inner = qk_norm_rope(x[4:-2], x[4:-2], rope=rope.slice(3, 50), norm=None)[0]
    assert torch.equal(y[4:-2], inner)
    assert torch.equal(y[:4], x[:4]) and torch.equal(y[-2:], x[-2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity_and_copy(backend: str) -> None:
    """The tensors that a captured graph reads are replaced in place, those of a slice too."""
    capacity = Capacity(200, segments=8, positions=64)
    layout = PackedLayout([[Text(9), Grid(2, 4, 4)]], order="tile", capacity=capacity)
    rope = layout.rope(AXES[64])
    piece = rope.slice(17, 120)
    other = PackedLayout(segments(), order="tile", capacity=capacity)
    layout.copy_(other)
    fresh = indexed(other.rope(AXES[64]), other)
    assert rope is layout.rope(AXES[64]) and rope.cos.shape == (64, 32)
    with use_backend(backend):
        assert_same(run(rope, (200,)), run(fresh, (200,)))
        assert_same(run(piece, (103,)), run(fresh.slice(17, 120), (103,)))
        y = randn(200, 1, 64, seed=1)
        padding = qk_norm_rope(y, y, rope=rope, norm=None)[0][int(other.counts[0]) :]
    assert torch.equal(padding, y[int(other.counts[0]) :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_batch_shares_one_clip(backend: str) -> None:
    layout = PackedLayout([[Text(3), Grid(2, 3, 4)]])
    rope = layout.rope(AXES[64])
    with use_backend(backend):
        assert_same(run(rope, (3, 27)), run(indexed(rope, layout), (3, 27)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_joint_streams(backend: str, order: Any) -> None:
    """Each stream visits its own tokens of the pack, which lie apart."""
    layout = PackedLayout(segments(), order=order)
    rope = layout.rope(AXES[64])
    index = (layout.text_tokens, layout.grid_tokens)
    streams = [
        tuple(randn(len(rows), 2, 64, seed=3 * s + i).requires_grad_() for i in range(3))
        for s, rows in enumerate(index)
    ]
    results = []
    with use_backend(backend):
        for r in (rope, indexed(rope, layout)):
            joint = qk_norm_rope_joint(streams, rope=r, index=index)
            upstream = [randn(*y.shape, seed=40) for y in joint]
            leaves = [t for stream in streams for t in stream]
            results.append([*joint, *torch.autograd.grad(joint, leaves, upstream)])
    assert_same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_of_another_layout(backend: str) -> None:
    """q and k of two packs, in different orders; and grids on one side, an index on the other."""
    layout = PackedLayout(segments(), order="tile")
    k_layout = PackedLayout([[Grid(3, 3, 2, origin=(9, 0, 0)), Text(2)]])
    rope, k_rope = (pack.rope(AXES[64]) for pack in (layout, k_layout))
    q, k = (randn(r.num_tokens, 2, 64, seed=i) for i, r in enumerate((rope, k_rope)))
    with use_backend(backend):
        expected = [qk_norm_rope(x, x, rope=r)[0] for x, r in ((q, rope), (k, k_rope))]
        for mine, other in (
            (rope, k_rope),
            (rope, indexed(k_rope, k_layout)),
            (indexed(rope, layout), k_rope),
        ):
            assert_same(list(qk_norm_rope(q, k, rope=mine, k_rope=other)), expected)


def test_new_lengths_do_not_compile_again() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(qkv: Tensor, weight: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.unbind(1)
        return qk_norm_rope(q, k, weight, weight, layout.rope(AXES[64]))

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    weight = randn(64, seed=2).requires_grad_()
    counts = []
    for n in range(1, 5):  # one part, then several: more tokens, parts and table rows
        layout = PackedLayout([[Text(n), Grid(n + 1, 5, 6 * n)][2 - min(n, 2) :] for _ in range(n)])
        layout.rope(AXES[64])
        qkv = randn(layout.num_tokens, 3, 2, 64, seed=1).requires_grad_()
        with use_backend("native"):
            (mine, _), (theirs, _) = (f(qkv, weight, layout) for f in (compiled, block))
        assert torch.equal(mine, theirs)
        grads = [torch.autograd.grad(y.sum(), (qkv, weight)) for y in (mine, theirs)]
        assert_same(list(grads[0]), list(grads[1]))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, f"compilations after each pack: {counts}"


def test_nothing_is_kept_per_token() -> None:
    layout = PackedLayout([[Grid(4, 32, 32)]])
    positions = layout.rope((4, 4, 4)).positions
    assert isinstance(positions, GridPositions)
    assert positions.part_of_token is layout.part_of_token
    assert positions.parts.numel() == 2 * 7 and layout.rope((4, 4, 4)).cos.shape == (32, 6)


# --- wrong tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"), [(1, 10**6), (2, 0), (4, -1), (6, 3), (8, 0), (9, 99)]
)  # fmt: skip
def test_raw_calls_cannot_read_outside_the_tables(column: int, value: int) -> None:
    layout = PackedLayout([[Grid(2, 3, 4)]], order="tile")
    rope = layout.rope((2, 4, 2))
    assert isinstance(rope.positions, GridPositions)
    parts = rope.positions.parts.clone()
    parts[column] = value
    x = randn(24, 1, 8, seed=1)
    wrong = replace(rope, positions=replace(rope.positions, parts=parts))
    with use_backend("native"), pytest.raises(RuntimeError, match="parts: expected grids within"):
        qk_norm_rope(x, x, rope=wrong)
    number = layout.part_of_token.clone()
    number[5] = 2
    wrong = replace(rope, positions=replace(rope.positions, part_of_token=number))
    with use_backend("native"), pytest.raises(RuntimeError, match=r"part_of_token: expected .*2\)"):
        qk_norm_rope(x, x, rope=wrong)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "flat parts and part_size 7 or 11", {"part_size": 8}),
        (ValueError, "flat parts", {"parts": torch.zeros(2, 7, dtype=torch.int32)}),
        (TypeError, "expected parts of contiguous int32", {"parts": torch.zeros(14)}),
        (TypeError, "positions: expected contiguous int32", {"part_of_token": torch.zeros(24)}),
        (ValueError, "rope: expected 24 tokens, got 3",
         {"part_of_token": torch.zeros(3, dtype=torch.int32)}),
    ],
)  # fmt: skip
def test_bad_positions(error: type[Exception], match: str, change: dict[str, Any]) -> None:
    rope = PackedLayout([[Grid(2, 3, 4)]]).rope((2, 4, 2))
    x = randn(24, 1, 8)
    assert isinstance(rope.positions, GridPositions)
    wrong = replace(rope, positions=replace(rope.positions, **change))
    with pytest.raises(error, match=match):
        qk_norm_rope(x, x, rope=wrong)
    with pytest.raises(ValueError, match="rope.axes: expected three with positions of a layout"):
        qk_norm_rope(x, x, rope=replace(rope, axes=(4, 4)))
