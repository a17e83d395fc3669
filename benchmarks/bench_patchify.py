"""patchify and unpatchify: latents of a mix of sizes, raster and tile order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sora_kernels.ops.patchify import patchify, unpatchify
from sora_kernels.packing import Grid, PackedLayout

from .registry import DTYPES, Case, Context, Inputs, op_cases

PATCH = (1, 2, 2)
CHANNELS = 16
# Latent sizes: a 480p clip, a portrait one, short square ones and images.
MIX = ((13, 60, 104), (9, 104, 60), (5, 64, 64), (5, 48, 80), (1, 128, 128), (1, 96, 160))


def inputs(order: Any, dtype: str, device: torch.device) -> Inputs:
    layout = PackedLayout.from_grids(MIX, PATCH, order=order, device=device)
    videos = [torch.randn(CHANNELS, *size, device=device).to(DTYPES[dtype]) for size in MIX]
    return {**{f"video{i}": x for i, x in enumerate(videos)}, "layout": layout}


def token_inputs(order: Any, dtype: str, device: torch.device) -> Inputs:
    given = inputs(order, dtype, device)
    layout = given["layout"]
    videos = [x for name, x in given.items() if name != "layout"]
    return {"tokens": patchify(videos, layout), "layout": layout}


def ours(layout: PackedLayout, **videos: Tensor) -> Tensor:
    return patchify(list(videos.values()), layout)


def ours_back(tokens: Tensor, layout: PackedLayout) -> Any:
    return unpatchify(tokens, layout, CHANNELS)


def plain(layout: PackedLayout, **videos: Tensor) -> Tensor:
    """einops' rearrange of each clip, spelled out, then cat; tile order by one gather."""
    pt, ph, pw = PATCH
    pieces = []
    for x in videos.values():
        c, t, h, w = x.shape
        blocks = x.view(c, t // pt, pt, h // ph, ph, w // pw, pw)
        pieces.append(blocks.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * pt * ph * pw))
    tokens = torch.cat(pieces)
    order = layout.raster_of_token
    return tokens if order is None else tokens.index_select(0, order)


def plain_back(tokens: Tensor, layout: PackedLayout) -> Any:
    pt, ph, pw = PATCH
    order = layout.raster_of_token
    if order is not None:
        tokens = torch.empty_like(tokens).index_copy(0, order, tokens)
    grids = [part for part in layout.parts if isinstance(part, Grid)]
    videos = []
    for x, g in zip(tokens.split([g.num_tokens for g in grids]), grids, strict=True):
        blocks = x.view(g.t, g.h, g.w, CHANNELS, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
        videos.append(blocks.reshape(CHANNELS, g.t * pt, g.h * ph, g.w * pw))
    return videos


def cases(context: Context) -> Iterable[Case]:
    elements = CHANNELS * sum(t * h * w for t, h, w in MIX)
    names = tuple(f"video{i}" for i in range(len(MIX)))
    for order in context.pick(quick=("tile",), full=("raster", "tile")):
        for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
            size = elements * DTYPES[dtype].itemsize
            moved = {"fwd": 2 * size, "bwd": 2 * size}
            tokens = elements // (CHANNELS * PATCH[0] * PATCH[1] * PATCH[2])
            case = f"{len(MIX)} clips {tokens} tokens {order}"
            yield from op_cases(
                "patchify",
                case,
                dtype,
                inputs=partial(inputs, order, dtype),
                ours=ours,
                plain=plain,
                bytes=moved,
                flops={"fwd": 0, "bwd": 0},
                grads=names,
            )
            if not context.quick:
                yield from op_cases(
                    "unpatchify",
                    case,
                    dtype,
                    inputs=partial(token_inputs, order, dtype),
                    ours=ours_back,
                    plain=plain_back,
                    bytes=moved,
                    flops={"fwd": 0, "bwd": 0},
                    grads=("tokens",),
                )
