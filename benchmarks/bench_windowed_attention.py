"""packed_attention with a window: videos, images and text under 3-D windows of tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, packed_attention
from sora_kernels.ops.windowed_attention.reference import segment_mask
from sora_kernels.packing import Part
from sora_kernels.packing.windows import SegmentGrid, merged, seen_ranges

from .bench_packed_attention import with_pointers
from .registry import DTYPES, Case, Context, Inputs, Unavailable, op_cases

MASKED = 8192
"""Tokens up to which plain PyTorch is one call with a dense mask; beyond, it is a loop of tiles."""


@dataclass(frozen=True)
class Shape:
    """`clips` are (text tokens, grid, tile) of each segment."""

    name: str
    clips: tuple[tuple[int, tuple[int, int, int], tuple[int, int, int]], ...]
    heads: int
    width: int
    window: Window = Window((3, 3, 3))

    def layout(self, device: torch.device | str) -> PackedLayout:
        parts: list[list[Part]] = [
            [Text(n), Grid(*grid, tile=tile)] for n, grid, tile in self.clips
        ]
        return PackedLayout(parts, order="tile", device=device)


VIDEO = Shape("video", ((0, (8, 16, 24), (2, 4, 4)),), 6, 64)
CPU = (
    VIDEO,
    Shape("text+video", ((77, (6, 24, 24), (2, 6, 6)),), 6, 64, Window((1, 3, 3), sink=1)),
    Shape("causal", ((0, (16, 16, 16), (1, 8, 8)),), 6, 64, Window((4, None, None), causal=True)),
    Shape(
        "mix",
        ((20, (4, 16, 24), (2, 4, 4)), (12, (1, 32, 32), (1, 8, 8)), (30, (8, 12, 12), (2, 4, 4))),
        6, 64,
    ),
)  # fmt: skip
CUDA = (
    Shape("hunyuan", ((0, (30, 48, 80), (6, 8, 8)),), 24, 128),  # 720p; window (18, 24, 24)
    Shape("hunyuan joint", ((256, (30, 48, 80), (6, 8, 8)),), 24, 128),
    Shape("wan", ((0, (21, 45, 80), (6, 8, 8)),), 12, 128),
    Shape("video", ((0, (12, 32, 32), (6, 8, 8)),), 24, 64, Window((1, 3, 3))),
    Shape(
        "mix",
        ((9, (24, 40, 40), (6, 8, 8)), (9, (1, 96, 96), (1, 8, 16)), (9, (12, 48, 80), (6, 8, 8))),
        24, 128,
    ),
)  # fmt: skip


def inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    layout = shape.layout(device)
    q, k, v = torch.randn(layout.num_tokens, 3, shape.heads, shape.width, device=device).unbind(1)
    given: Inputs = {name: x.to(DTYPES[dtype]) for name, x in (("q", q), ("k", k), ("v", v))}
    return given | {"layout": layout, "mask": dense_mask(layout, shape.window)}


def dense_mask(layout: PackedLayout, window: Window) -> Tensor | None:
    """bool `[N, N]` of the whole pack, made outside the clock; None if it would not fit."""
    if layout.num_tokens > MASKED:
        return None
    places = layout.coordinates().long().split(layout.seqlens)
    return torch.block_diag(
        *[
            segment_mask(place, segment, layout, window)
            for place, segment in zip(places, layout.segments, strict=True)
        ]
    ).bool()


def ours(window: Window, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any) -> Any:
    return packed_attention(q, k, v, layout, window=window)


def plain(
    window: Window, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Tensor | None
) -> Tensor:
    """Plain PyTorch: SDPA with a dense mask; for long packs SDPA of each tile with its keys."""
    if mask is None:
        return per_tile(window, q, k, v, layout, mask)
    q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask)
    return out[0].transpose(0, 1)


def per_tile(
    window: Window, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any
) -> Tensor:
    """Plain PyTorch: one dense SDPA call for each tile, its keys copied side by side."""
    pieces: list[Tensor] = []
    table = layout.window_table().tolist()
    for row, *segment in zip(table, *(x.split(layout.seqlens) for x in (q, k, v)), strict=True):
        grid = SegmentGrid(len(segment[0]), row[0], tuple(row[1:4]), tuple(row[4:7]))
        blocks = [(-1, (0, grid.start)), (-1, (grid.stop, grid.length))]
        t, h, w = grid.counts
        blocks[1:1] = [(number, grid.tile_tokens(number)) for number in range(t * h * w)]
        for number, (first, stop) in blocks:
            if stop == first:
                continue
            ranges = merged(seen_ranges(grid, number, window))
            q_t = segment[0][first:stop].transpose(0, 1)[None]
            k_t, v_t = (
                torch.cat([x[a:b] for a, b in ranges]).transpose(0, 1)[None] for x in segment[1:]
            )
            pieces.append(F.scaled_dot_product_attention(q_t, k_t, v_t)[0].transpose(0, 1))
    return torch.cat(pieces)


class Flex:
    """FlexAttention, compiled; its block mask is made at the first call, outside the clock."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.made: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any) -> Tensor:
        if q.device.type == "cpu" and q.requires_grad:
            raise Unavailable("FlexAttention has no backward on the CPU")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self.made is None:
            n = layout.num_tokens
            seen = self.rule(layout)
            blocks = create_block_mask(seen, None, None, n, n, device=str(q.device))
            self.made = torch.compile(flex_attention, dynamic=False), blocks
        call, blocks = self.made
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(q_b, k_b, v_b, block_mask=blocks)[0].transpose(0, 1)

    def rule(self, layout: PackedLayout) -> Any:
        """The window as FlexAttention takes it: a function of the two token numbers."""
        segment = layout.segment_of_token.long()
        rows = layout.window_table().long()[segment]
        place = torch.arange(layout.num_tokens, device=rows.device) - layout.cu_seqlens[segment]
        size, tile = rows[:, 1:4], rows[:, 4:7].clamp(min=1)
        main = (place >= rows[:, 0]) & (place < rows[:, 0] + size.prod(1))
        tiles = layout.coordinates().long() // tile
        counts = (size + tile - 1) // tile
        back, ahead = (torch.tensor(x, device=rows.device) for x in self.window.reach)
        low, high = tiles - back, tiles + ahead + 1
        for axis in range(3):
            if self.window.clamped(axis):
                width = torch.minimum(high[:, axis] - low[:, axis], counts[:, axis])
                low[:, axis] = low[:, axis].clamp(min=0).minimum(counts[:, axis] - width)
                high[:, axis] = low[:, axis] + width
        causal, sink = self.window.causal, self.window.sink

        def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
            near = main[i] & main[j]
            for axis in range(3):
                near = near & (tiles[j, axis] >= low[i, axis]) & (tiles[j, axis] < high[i, axis])
            if sink:
                sunk = main[i] & main[j] & (tiles[j, 0] < sink)
                near = near | (sunk & (tiles[j, 0] <= tiles[i, 0]) if causal else sunk)
            around = ~main[j] if causal else ~main[j] | ~main[i]
            return (near | around) & (segment[i] == segment[j])

        return seen


def cases(context: Context) -> Iterable[Case]:
    on_cuda = context.device == "cuda"
    for shape in context.pick(quick=(VIDEO,), full=CUDA if on_cuda else CPU):
        layout = shape.layout("cpu")
        pairs = layout.window_pairs(shape.window)
        share = 100 * pairs / sum(n * n for n in layout.seqlens)
        size = f"{layout.num_tokens}x{shape.heads}x{shape.width}"
        case = f"window {shape.name} {size} {share:.0f}% of pairs"
        flops = 4 * pairs * shape.heads * shape.width
        for dtype in context.pick(quick=("fp32",), full=("bf16",) if on_cuda else ("fp32", "bf16")):
            moved = layout.num_tokens * shape.heads * shape.width * DTYPES[dtype].itemsize
            peers: dict[str, Any] = {}
            if not context.quick:
                peers["flex_attention"] = Flex(shape.window)
                if layout.num_tokens <= MASKED:
                    peers["per_tile"] = partial(per_tile, shape.window)
            made = op_cases(
                "packed_attention",  # one op to its users: `--only packed_attention` shows both
                case,
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=partial(ours, shape.window),
                plain=partial(plain, shape.window),
                compile=False,  # library calls: there is nothing to fuse
                peers=peers,
                bytes={"fwd": 4 * moved, "bwd": 8 * moved},
                flops={"fwd": flops, "bwd": flops * 5 // 2},
                grads=("q", "k", "v"),
            )
            yield from (with_pointers(case, shape.width) for case in made) if on_cuda else made
