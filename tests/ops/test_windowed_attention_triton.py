"""The Triton kernels of windowed attention, in the interpreter, against masks by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, backend, packed_attention
from sora_kernels.ops.windowed_attention import kernels
from sora_kernels.ops.windowed_attention.config import config_for
from sora_kernels.ops.windowed_attention.device import block_at, plan
from sora_kernels.ops.windowed_attention.reference import windowed_attention_reference
from sora_kernels.packing import Capacity
from sora_kernels.packing.tiles import tile_shape
from sora_kernels.packing.windows import SegmentGrid, seeing_ranges, seen_ranges
from tests.helpers import check, poisoned, randn
from tests.ops.windowed import layouts, masked_attention, tile_mask, windows

NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# --- block number -> rows -----------------------------------------------------------------------


@triton.jit
def _list_blocks(
    table_ptr, count_ptr, row_ptr, end_ptr, segment, tiles, length, back_t, back_h, back_w,
    ahead_t, ahead_h, ahead_w, clamp, causal, sink,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Every block of every tile (the first row: tile -1) at once: the arithmetic is elementwise."""
    tile = tl.arange(0, TILES)[:, None]
    x = tl.arange(0, BLOCKS)[None, :]
    blocks, where = plan(
        table_ptr, segment, tile - 1, length, back_t, back_h, back_w, ahead_t, ahead_h, ahead_w,
        clamp, causal, sink, BLOCK, INVERSE,
    )  # fmt: skip
    row, left = block_at(x, where, BLOCK)
    at = tile * BLOCKS + x
    tl.store(row_ptr + at, row, mask=tile <= tiles)
    tl.store(end_ptr + at, row + left, mask=tile <= tiles)
    tl.store(count_ptr + tile, blocks, mask=tile <= tiles)


def list_blocks(
    table: Tensor, segment: int, grid: SegmentGrid, window: Window, block: int, inverse: bool
) -> list[list[tuple[int, int]]]:
    """(first row, end) of each block that tile -1, 0, 1, ... reads."""
    tiles = grid.counts[0] * grid.counts[1] * grid.counts[2]
    width = triton.next_power_of_2(grid.length // block + 64)
    counts = torch.full((tiles + 1,), -1, dtype=torch.int32)
    rows, ends = torch.full((2, tiles + 1, width), -1, dtype=torch.int32)
    _list_blocks[(1,)](
        table, counts, rows, ends, segment, tiles, grid.length, *window.as_ints(),
        TILES=triton.next_power_of_2(tiles + 1), BLOCKS=width, BLOCK=block, INVERSE=inverse,
    )  # fmt: skip
    assert counts.max() <= width
    return [
        list(zip(row[:n], end[:n], strict=True))
        for n, row, end in zip(counts.tolist(), rows.tolist(), ends.tolist(), strict=True)
    ]


def formula(grid: SegmentGrid, number: int, window: Window, block: int, inverse: bool) -> int:
    """Blocks of the ranges of `windows`, where w-runs of the window that touch are one."""
    ranges = (seeing_ranges if inverse else seen_ranges)(grid, number, window)
    alone = [r for r in ranges if number < 0 or not grid.start <= r[0] < grid.stop]
    inside = [r for r in ranges if r not in alone]
    if window.sink and not inverse:
        alone, inside = alone + inside[:1], inside[1:]
    joined: list[tuple[int, int]] = []
    for first, stop in inside:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, stop))
    return sum(-(-(stop - first) // block) for first, stop in alone + joined)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layouts(), windows(), st.sampled_from([1, 4, 16]), st.booleans())
def test_blocks_hold_what_the_mask_says_once_each(
    layout: PackedLayout, window: Window, block: int, inverse: bool
) -> None:
    seen = tile_mask(layout, window)
    if inverse:
        seen = seen.mT
    begin = 0
    for segment, grid in enumerate(layout._host.segment_grids):
        listed = list_blocks(layout.window_table(), segment, grid, window, block, inverse)
        for number, blocks in enumerate(listed, start=-1):
            tokens = grid.tile_tokens(number) if number >= 0 else (0, grid.start)
            if number < 0 and tokens[1] == 0:
                tokens = (grid.stop, grid.length)
            if tokens[0] == tokens[1]:
                continue
            rows = [x for row, end in blocks for x in range(row, min(row + block, end))]
            want = seen[begin + tokens[0], begin : begin + grid.length].nonzero()[:, 0].tolist()
            assert sorted(rows) == want
            assert all(row < end for row, end in blocks)
            assert len(blocks) == formula(grid, number, window, block, inverse)
        begin += grid.length


@pytest.mark.parametrize("inverse", [False, True])
def test_a_long_video_reads_its_window_alone(inverse: bool) -> None:
    """HunyuanVideo at 720p: 27 tiles of 384 tokens whatever the length, 81 blocks of 900."""
    grid = SegmentGrid(115_200 + 256, 256, (30, 48, 80), tile_shape(30, 48, 80))
    assert grid.tile == (6, 8, 8)
    table = torch.tensor([[256, 30, 48, 80, 6, 8, 8, 0]], dtype=torch.int32)
    listed = list_blocks(table, 0, grid, Window((3, 3, 3)), 128, inverse)
    text = 256 // 128
    assert len(listed[0]) == 902
    counts = [len(blocks) - text for blocks in listed[1:]]
    assert sum(counts) == 300 * 81
    corner, middle = counts[0] // 3, counts[(2 * 6 + 3) * 10 + 5] // 3
    # Clamping: windows at the border reach further inside, and none reaches back.
    assert (corner, middle) == ((2 * 2 * 2, 5 * 4 * 3) if inverse else (27, 27))
    assert inverse or set(counts) == {81}


# --- accuracy -----------------------------------------------------------------------------------

# Few programs: a block of the interpreter takes 40 ms. Every axis has a partial tile somewhere.
VIDEO = [Text(3), Grid(3, 3, 2, tile=(2, 2, 2)), Grid(1, 1, 2, given=True)]
WIDE = [Grid(1, 2, 7, tile=(1, 2, 3))]
FRAMES = [Grid(3, 2, 2, tile=(1, 2, 1)), Text(2)]
IMAGE = [Grid(1, 7, 9, tile=(1, 4, 5))]  # two blocks per tile
# Parts; window; heads, key heads, head dim; dtype.
CASES: dict[str, tuple[list[Any], Window, int, int, int, str]] = {
    "clamped": ([FRAMES, WIDE, [Text(5)]], Window((3, 1, 1)), 1, 1, 64, "fp32"),
    "truncated": ([WIDE, IMAGE], Window((1, 3, 1), "truncate"), 1, 1, 16, "fp32"),
    "gqa": ([VIDEO], Window((1, 1, 3)), 2, 1, 72, "fp16"),
    "causal-sink": ([FRAMES], Window((2, 1, 1), causal=True, sink=1), 1, 1, 96, "fp16"),
    "sink": ([FRAMES, VIDEO], Window((1, 1, 1), sink=2), 1, 1, 16, "bf16"),
    "causal-mqa": ([VIDEO, [Text(2)], []], Window((None, 3, 1), causal=True), 2, 1, 24, "fp32"),
    "one-tile": ([[Text(1), Grid(2, 3, 3, tile=(2, 3, 3))]], Window((3, 1, 1)), 1, 1, 128, "fp32"),
}


def inputs(case: str) -> tuple[PackedLayout, list[Tensor]]:
    """q, k, v in tile order: views of one packed tensor where the shapes allow it."""
    parts, _, heads, heads_k, dim, dtype_name = CASES[case]
    layout, dtype = PackedLayout(parts, order="tile"), DTYPES[dtype_name]
    n = layout.num_tokens
    if heads == heads_k:
        return layout, list(randn(n, 3, heads, dim, dtype=dtype).unbind(1))
    q = randn(n, heads, dim + 8, dtype=dtype)[..., :dim]
    return layout, [q, *randn(n, 2, heads_k, dim, dtype=dtype).unbind(1)]


def run(fn: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of `fn(q, k, v)` for seeded upstream gradients of both results."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    with poisoned():
        out, lse = fn(*leaves)
        dout = randn(*out.shape, dtype=tensors[0].dtype, seed=1).double()
        loss = (out.double() * dout).sum() + (lse.double() * randn(*lse.shape, seed=2)).sum()
        loss.backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def attention(layout: PackedLayout, window: Any) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with backend.use_backend("triton"):
            return packed_attention(q, k, v, layout, window=window, return_lse=True)

    return call


@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(case: str) -> None:
    _, window, _, _, dim, dtype_name = CASES[case]
    dtype = DTYPES[dtype_name]
    layout, tensors = inputs(case)
    seen = tile_mask(layout, window)
    got = run(attention(layout, window), tensors, dtype)
    exact = run(lambda q, k, v: masked_attention(q, k, v, seen, dim**-0.5), tensors, torch.float64)
    lowp = run(
        lambda q, k, v: windowed_attention_reference(q, k, v, layout, window, dim**-0.5),
        tensors, dtype,
    )  # fmt: skip
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for name, *results in zip(NAMES, got, exact, lowp, strict=True):
        # bf16 stores truncate in the interpreter
        slack = 1.0 if dtype is torch.bfloat16 and name != "lse" else 0.0
        check(*results, grad=name.startswith("d"), extra_ulp=slack, name=name)


@pytest.mark.parametrize("window", [(None, None, None), Window((9, 9, 9), sink=1)])
def test_a_window_over_the_grid_is_dense_attention(window: Any) -> None:
    layout = PackedLayout([VIDEO, [Grid(1, 5, 6, tile=(1, 4, 6))]], order="tile")
    tensors = list(randn(layout.num_tokens, 3, 1, 16).unbind(1))
    got = run(attention(layout, window), tensors, torch.float32)
    dense = run(lambda *x: packed_attention(*x, layout, return_lse=True), tensors, torch.float32)
    for name, a, b in zip(NAMES, got, dense, strict=True):
        torch.testing.assert_close(
            a, b, atol=3e-6, rtol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


# --- bits ---------------------------------------------------------------------------------------


def test_a_segment_computes_the_same_bits_in_any_pack() -> None:
    window = Window((1, 1, 3), sink=1)
    packs = [VIDEO, [], WIDE, [Text(18)]]
    layout = PackedLayout(packs, order="tile")
    tensors = randn(layout.num_tokens, 3, 1, 16).unbind(1)
    dout = randn(layout.num_tokens, 1, 16, seed=1)

    def call(layout: PackedLayout, rows: slice) -> list[Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in tensors]
        out, lse = attention(layout, window)(*leaves)
        out.backward(dout[rows])
        return [out.detach(), lse.detach().mT, *(x.grad for x in leaves)]

    packed = call(layout, slice(None))
    ends = layout.cu_seqlens.tolist()
    for number, parts in enumerate(packs):
        rows = slice(ends[number], ends[number + 1])
        alone = call(PackedLayout([parts], order="tile"), rows)
        for name, a, b in zip(NAMES, packed, alone, strict=True):
            assert torch.equal(a[rows], b), (number, name)


def test_three_runs_and_a_capacity_give_the_same_bits() -> None:
    window = Window((2, 1, 3), causal=True)
    parts = [Grid(2, 2, 4, tile=(1, 2, 4)), Text(2)]
    layout = PackedLayout([parts], order="tile")
    roomy = PackedLayout([parts], order="tile", capacity=Capacity(24, segments=3, blocks=9))
    n = layout.num_tokens
    tensors = list(randn(24, 3, 1, 16, dtype=torch.float16).unbind(1))
    dout = randn(24, 1, 16, dtype=torch.float16, seed=1)

    def call(layout: PackedLayout) -> list[Tensor]:
        rows = slice(0, layout.num_tokens)
        leaves = [x[rows].detach().requires_grad_() for x in tensors]
        with poisoned():
            out, lse = attention(layout, window)(*leaves)
            out.backward(dout[rows])
        return [out.detach(), lse.detach().mT, *(x.grad for x in leaves)]

    first, *others = [call(pack) for pack in (layout, layout, layout, roomy)]
    for again in others:
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.isfinite(b).all(), name
            assert torch.equal(a, b[:n]), name


# --- launchers ----------------------------------------------------------------------------------


def test_only_what_is_asked_is_computed() -> None:
    layout = PackedLayout([[Grid(2, 3, 2, tile=(1, 3, 2))]], order="tile")
    window = Window((1, 1, 1))
    q, k, v = randn(layout.num_tokens, 3, 1, 16).unbind(1)
    config = config_for(q)
    geometry = (layout.cu_seqlens, layout.window_table())
    work = layout.window_work(config.fwd.block_m, window, "query")
    out, lse = kernels.forward(q, k, v, *geometry, work, window.as_ints(), 0.25)
    works = (
        layout.window_work(config.dq.block_m, window, "query"),
        layout.window_work(config.dkv.block_n, window, "key"),
    )

    def back(*needs: bool) -> tuple[Tensor, ...]:
        return kernels.backward(
            out, None, q, k, v, out, lse, *geometry, *works, window.as_ints(), 0.25, *needs
        )

    both = back(True, True)
    only_q, only_kv = back(True, False), back(False, True)
    assert torch.equal(only_q[0], both[0])
    assert [x.numel() for x in only_q[1:]] == [0, 0]
    assert only_kv[0].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(only_kv[1:], both[1:], strict=True))
    with pytest.raises(ValueError, match="work: expected the list"):
        kernels.forward(q, k, v, *geometry, None, window.as_ints(), 0.25)
    with pytest.raises(ValueError, match="work_dkv: expected the list"):
        kernels.backward(
            out, None, q, k, v, out, lse, *geometry, works[0], None, window.as_ints(), 0.25,
            True, True,
        )  # fmt: skip
