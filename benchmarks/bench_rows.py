"""How many modulation rows cost: one, one per sample, one per frame in either token order, one
per token. The claim is about time per byte, so compare ``gbps`` between these rows: a row per token
may take at most 1.3 times as long per byte as a single one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import PackedLayout, RowMap, norm_modulate, patchify

from .registry import DTYPES, Case, Context, Inputs, op_cases

WIDTH = 1152  # DiT-XL
CLIPS = [(8, 32, 64)] * 4  # latents: 4 clips of 8 frames of 512 tokens
TOKENS = 4 * 8 * 512
FRAMES = 4 * 8
#: name -> number of rows, in the order of the token's rows
ROWS = {"R=1": 1, "R=8": 8, "R=frames raster": FRAMES, "R=frames tile": FRAMES, "R=N": TOKENS}


def frame_rows(order: Literal["raster", "tile"], device: torch.device) -> RowMap:
    """A row per frame of each clip: runs in raster order, scattered over tiles in tile order."""
    layout = PackedLayout.from_grids(CLIPS, patch=(1, 2, 2), order=order, device=device)
    videos = [
        (torch.arange(t, device=device) + t * clip).view(1, t, 1, 1).expand(1, t, h, w).float()
        for clip, (t, h, w) in enumerate(CLIPS)
    ]
    return RowMap.from_index(patchify(videos, layout)[:, 0].int(), FRAMES)


def inputs(name: str, dtype: str, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    count = ROWS[name]
    frames = "frames" in name
    return {
        "x": randn(TOKENS, WIDTH),
        "shift": randn(count, WIDTH),
        "scale": randn(count, WIDTH),
        "rows": (
            frame_rows("tile" if name.endswith("tile") else "raster", device)
            if frames
            else RowMap.uniform(count, TOKENS // count)
        ),
    }


def ours(x: Tensor, shift: Tensor, scale: Tensor, rows: RowMap) -> Tensor:
    y = norm_modulate(x, shift, scale, rows=rows)
    assert isinstance(y, Tensor)
    return y


def plain(x: Tensor, shift: Tensor, scale: Tensor, rows: RowMap) -> Tensor:
    """Broadcast over runs of equal length, else gathered: what model code does."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if rows.index is not None:
        return normed * (1 + scale[rows.index]) + shift[rows.index]
    runs = normed.view(rows.num_rows, rows.tokens_per_row, -1)
    return (runs * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).view_as(x)


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=(), full=("fp32", "bf16"), cuda=("bf16",)):
        for name, count in ROWS.items():
            per_row = DTYPES[dtype].itemsize * WIDTH
            yield from op_cases(
                "norm_modulate_rows",
                f"{TOKENS}x{WIDTH} {name}",
                dtype,
                inputs=partial(inputs, name, dtype),
                ours=ours,
                plain=plain,
                bytes={
                    "fwd": per_row * (2 * TOKENS + 2 * count),
                    "bwd": per_row * (3 * TOKENS + 3 * count),
                },
                flops={"fwd": 9 * TOKENS * WIDTH, "bwd": 15 * TOKENS * WIDTH},
                grads=("x", "shift", "scale"),
            )
