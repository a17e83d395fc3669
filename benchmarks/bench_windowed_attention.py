"""packed_attention with a window: videos, images and text under 3-D windows of tiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, packed_attention
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN
from sora_kernels.ops.windowed_attention.block_sparse import Block, block_tensors
from sora_kernels.ops.windowed_attention.reference import segment_mask
from sora_kernels.packing import Part
from sora_kernels.packing.windows import SegmentGrid, merged, seen_ranges

from .bench_packed_attention import by_library, per_segment, with_pointers
from .registry import DTYPES, Case, Context, Inputs, Unavailable, op_cases

MASKED = 8192
"""Tokens up to which plain PyTorch is one call with a dense mask; beyond, it is a loop of tiles."""


@dataclass(frozen=True)
class Shape:
    """`clips` are (text tokens, grid, tile) of each segment; on a GPU the `whole` ones are timed
    without their window too, and by FlexAttention, which takes long to compile."""

    name: str
    clips: tuple[tuple[int, tuple[int, int, int], tuple[int, int, int]], ...]
    heads: int
    width: int
    window: Window = Window((3, 3, 3))
    whole: bool = True

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(text + t * h * w for text, (t, h, w), _ in self.clips)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs under the window."""
        return self.layout("cpu").window_pairs(self.window)

    @property
    def case(self) -> str:
        share = 100 * self.pairs / sum(n * n for n in self.lengths)
        return f"window {self.name} {self.size} {share:.0f}% of pairs"

    @property
    def size(self) -> str:
        return f"{self.tokens}x{self.heads}x{self.width}"

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
    Shape("wan", ((0, (21, 45, 80), (6, 8, 8)),), 12, 128),
    Shape("hunyuan joint", ((256, (30, 48, 80), (6, 8, 8)),), 24, 128, whole=False),
    Shape("video", ((0, (12, 32, 32), (6, 8, 8)),), 24, 64, Window((1, 3, 3))),
    Shape(
        "mix",
        ((9, (24, 40, 40), (6, 8, 8)), (9, (1, 96, 96), (1, 8, 16)), (9, (12, 48, 80), (6, 8, 8))),
        24, 128, whole=False,
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
    return packed_attention(q, k, v, layout, window=window, library=OWN)


def flash_attn_4(
    window: Window, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any
) -> Any:
    """Our windows on the block sparsity of flash-attn 4."""
    return by_library("flash_attn_4", q, k, v, layout, window)


def dense(function: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any) -> Any:
    """A call without the window: what the window saves is measured against it."""
    return function(q, k, v, layout)


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
    """FlexAttention, compiled, by its own kernel or by flash-attn 4 (``backend="FLASH"``).

    Its block mask is made at the first call, outside the clock, from our lists: by itself it would
    evaluate all N x N pairs.
    """

    def __init__(self, window: Window, backend: str | None = None) -> None:
        self.window = window
        self.options = None if backend is None else {"BACKEND": backend}
        self.made: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Any) -> Tensor:
        if reason := self.why_not(q):
            raise Unavailable(reason)
        from torch.nn.attention.flex_attention import flex_attention

        if self.made is None:
            compiled = torch.compile(flex_attention, dynamic=False)
            self.made = compiled, self.block_mask(layout, self.block(q))
        call, blocks = self.made
        q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = call(q_b, k_b, v_b, block_mask=blocks, kernel_options=self.options)
        return out[0].transpose(0, 1)

    def why_not(self, q: Tensor) -> str | None:
        from torch.nn.attention import flex_attention

        if self.options is None:
            on_cpu = q.device.type == "cpu" and q.requires_grad
            return "FlexAttention has no backward on the CPU" if on_cpu else None
        if "FLASH" not in get_args(getattr(flex_attention, "_Backend", None)):
            return "FlexAttention of this torch has no FLASH backend"
        if not q.is_cuda or torch.cuda.get_device_capability() < (9, 0):
            return "FlexAttention's FLASH backend needs an NVIDIA GPU of capability 9.0 or newer"
        if importlib.util.find_spec("flash_attn") is None:
            return "FlexAttention's FLASH backend needs flash_attn.cute, which is not installed"
        return None

    def block(self, q: Tensor) -> Block:
        wide = self.options and torch.cuda.get_device_capability()[0] != 9
        return (256, 128) if wide else (128, 128)

    def block_mask(self, layout: PackedLayout, block: Block) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        n = layout.num_tokens
        lists: Any = [x[None, None] for x in block_tensors(layout, self.window, block).by_query]
        return BlockMask.from_kv_blocks(
            lists[0], lists[1], lists[2], lists[3],
            BLOCK_SIZE=block, mask_mod=self.rule(layout), seq_lengths=(n, n),
        )  # fmt: skip

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


def peers_of(shape: Shape, quick: bool) -> dict[str, Any]:
    """Who else can run a shape under its window; each says itself where it cannot."""
    peers: dict[str, Any] = {
        "flash_attn_4": partial(flash_attn_4, shape.window),
        "flex_flash": Flex(shape.window, "FLASH"),
    }
    if not quick:
        if shape.whole:
            peers["flex_attention"] = Flex(shape.window)
        if shape.tokens <= MASKED:
            peers["per_tile"] = partial(per_tile, shape.window)
    return peers


def cases(context: Context) -> Iterable[Case]:
    on_cuda = context.device == "cuda"
    dtypes = ("bf16",) if on_cuda else ("fp32", "bf16")
    for shape in context.pick(quick=(VIDEO,), full=CUDA if on_cuda else CPU):
        for dtype in context.pick(quick=dtypes[:1], full=dtypes):
            size = shape.tokens * shape.heads * shape.width * DTYPES[dtype].itemsize
            windowed = op_cases(
                "packed_attention",  # one op to its users: `--only packed_attention` shows both
                shape.case,
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=partial(ours, shape.window),
                plain=partial(plain, shape.window),
                compile=False,  # library calls: there is nothing to fuse
                peers=peers_of(shape, context.quick),
                bytes={"fwd": 4 * size, "bwd": 8 * size},
                flops=_flops(shape, shape.pairs),
                grads=("q", "k", "v"),
            )
            if not on_cuda:
                yield from windowed
                continue
            yield from (with_pointers(case, shape.width) for case in windowed)
            if not shape.whole:
                continue
            yield from op_cases(
                "packed_attention",
                f"no window {shape.name} {shape.size}",
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=partial(dense, partial(packed_attention, library=OWN)),
                plain=partial(dense, partial(per_segment, shape.lengths)),
                compile=False,
                peers={name: partial(dense, partial(by_library, name)) for name in LIBRARIES},
                bytes={"fwd": 4 * size, "bwd": 8 * size},
                flops=_flops(shape, sum(n * n for n in shape.lengths)),
                grads=("q", "k", "v"),
            )


def _flops(shape: Shape, pairs: int) -> dict[str, int]:
    forward = 4 * pairs * shape.heads * shape.width
    return {"fwd": forward, "bwd": forward * 5 // 2}
