"""Windows as lists of blocks: expanded again they are the mask, no more and no less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window
from sora_kernels.ops.windowed_attention.block_sparse import (
    Block,
    BlockTensors,
    Lists,
    block_tensors,
    token_places,
    visible,
)
from sora_kernels.packing import Capacity
from tests.ops.windowed import layouts, tile_mask, windows

BLOCKS = [(4, 4), (8, 4), (16, 8), (128, 128), (256, 128)]


def blocks_of(n: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def expand(made: BlockTensors, lists: Lists, n: int, block: Block, transposed: bool) -> Tensor:
    """The mask that the lists and the function of two tokens stand for, as a kernel reads them."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    sides = [blocks_of(n, size) for size in block]
    rows, columns = sides[::-1] if transposed else sides
    for row, part_count, part, full_count, full in zip(rows, *lists, strict=True):
        assert not set(part[:part_count].tolist()) & set(full[:full_count].tolist())
        for count, listed, whole in ((part_count, part, False), (full_count, full, True)):
            taken = listed[:count].tolist()
            assert taken == sorted(set(taken))
            assert not listed[count:].any()
            for number in taken:
                q, k = (columns[number], row) if transposed else (row, columns[number])
                seen = visible(made.places[:, q, None], made.places[:, None, k])
                assert seen.any(), "a block is visited for nothing"
                assert seen.all() == whole, "a block is in the wrong list"
                mask[q, k] = seen
    return mask


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layouts(), windows(), st.sampled_from(BLOCKS))
def test_lists_expand_to_the_mask(layout: PackedLayout, window: Window, block: Block) -> None:
    n, want = layout.num_tokens, tile_mask(layout, window)
    places = token_places(layout, window)
    assert places.dtype == torch.int32
    assert torch.equal(visible(places[:, :, None], places[:, None]), want)
    made = block_tensors(layout, window, block)
    assert made.places.shape[1] % block[0] == 0 == made.places.shape[1] % block[1]
    assert not visible(made.places[:, :n, None], made.places[:, None, n:]).any()
    assert not visible(made.places[:, n:, None], made.places[:, None, :n]).any()
    assert torch.equal(expand(made, made.by_query, n, block, False), want)
    assert torch.equal(expand(made, made.by_key, n, block, True), want)
    assert int(want.sum()) == layout.window_pairs(window)
    for tensor in (made.places, *made.by_query, *made.by_key, *made[3:]):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layouts(), windows(), st.sampled_from(BLOCKS[:3]))
def test_turns_number_the_key_blocks_of_a_query_block(
    layout: PackedLayout, window: Window, block: Block
) -> None:
    """Each block of dq is added to in ascending order of the key blocks, from 0 without a gap."""
    made = block_tensors(layout, window, block)
    turns: dict[int, list[tuple[int, int]]] = {}
    lists = made.by_key
    for key in range(len(lists.full)):
        for count, listed, turn in (
            (lists.partial_count, lists.partial, made.turn_partial),
            (lists.full_count, lists.full, made.turn_full),
        ):
            for at in range(int(count[key])):
                turns.setdefault(int(listed[key, at]), []).append((key, int(turn[key, at])))
    for number, added in turns.items():
        assert [turn for _, turn in sorted(added)] == list(range(len(added)))
        visited = made.by_query.partial_count[number] + made.by_query.full_count[number]
        assert len(added) == int(visited)


def test_aligned_tiles_need_no_partial_block() -> None:
    """30x48x80 tokens in tiles of 6x8x8 = 384 = 3 blocks, as HunyuanVideo at 720p."""
    layout = PackedLayout([[Grid(30, 48, 80, tile=(6, 8, 8))]], order="tile")
    made = block_tensors(layout, Window((3, 3, 3)), (128, 128))
    assert not made.by_query.partial_count.any()
    assert made.by_query.full_count.tolist() == [3 * 27] * 900
    assert made.by_key.full_count.sum() == 900 * 3 * 27


def test_more_text_makes_only_the_edges_partial() -> None:
    layout = PackedLayout([[Text(77), Grid(12, 32, 32, tile=(6, 8, 8))]], order="tile")
    window = Window((1, 3, 3))
    lists = block_tensors(layout, window, (128, 128)).by_query
    full, partial = int(lists.full_count.sum()), int(lists.partial_count.sum())
    assert full * 128 * 128 <= layout.window_pairs(window) < (full + partial) * 128 * 128
    assert full > partial


def test_autocast_and_tf32_change_nothing() -> None:
    layout = PackedLayout([[Text(7), Grid(6, 9, 11, tile=(2, 3, 4))]], order="tile")
    window, block = Window((3, 3, 1), sink=1), (256, 128)
    want = block_tensors(layout, window, block)
    again = PackedLayout(layout.segments, order="tile")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = block_tensors(again, window, block)
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert torch.equal(a, b)


def flat(made: BlockTensors) -> tuple[Tensor, ...]:
    return (made.places, *made.by_query, *made.by_key, *made[3:])


def test_built_once_and_renewed_in_place() -> None:
    """A captured graph keeps reading the same memory when `copy_` puts another pack in."""
    capacity = Capacity(512, segments=6, parts=12)
    packs = (
        [[Text(5), Grid(4, 6, 6, tile=(2, 2, 2))], [Text(9)]],
        [[Grid(3, 7, 9, tile=(1, 4, 4)), Text(30)], [Grid(1, 8, 8)], [Text(1)]],
    )
    window, block = Window((3, 1, 3)), (16, 8)
    layout, other = (PackedLayout(p, order="tile", capacity=capacity) for p in packs)
    made = block_tensors(layout, window, block)
    again = flat(block_tensors(layout, window, block))
    assert all(a is b for a, b in zip(flat(made), again, strict=True))
    assert torch.equal(expand(made, made.by_query, 512, block, False)[:158, :158],
                       tile_mask(PackedLayout(packs[0], order="tile"), window))  # fmt: skip
    addresses = [x.data_ptr() for x in flat(made)]
    layout.copy_(other)
    assert addresses == [x.data_ptr() for x in flat(block_tensors(layout, window, block))]
    used = sum(other.seqlens[: len(packs[1])])
    want = tile_mask(PackedLayout(packs[1], order="tile"), window)
    assert torch.equal(expand(made, made.by_query, 512, block, False)[:used, :used], want)
    assert torch.equal(expand(made, made.by_key, 512, block, True)[:used, :used], want)


def test_a_pack_of_more_tiles_than_the_capacity_is_named() -> None:
    capacity = Capacity(512, segments=2, parts=2, blocks=20)
    layout = PackedLayout([[Grid(4, 8, 8, tile=(1, 2, 2))]], order="tile", capacity=capacity)
    with pytest.raises(ValueError, match=r"capacity\.blocks: the pack has 65 tiles"):
        block_tensors(layout, Window((1, 1, 1)), (16, 16))


@pytest.mark.parametrize("parts", [[], [[]], [[Text(0)], []]])
def test_no_tokens(parts: list[list[Text]]) -> None:
    layout = PackedLayout(parts, order="tile")
    made = block_tensors(layout, Window((3, 3, 3)), (128, 128))
    assert all(x.numel() == 0 for x in flat(made))


def test_raster_order_is_refused() -> None:
    with pytest.raises(ValueError, match="window: expected a layout"):
        block_tensors(PackedLayout([[Grid(2, 2, 2)]]), Window((1, 1, 1)), (128, 128))
