"""Triton kernel of patchify and unpatchify: one copy between a video and its rows of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, launch
from .config import chip_of, choose_config

if TYPE_CHECKING:
    from ...aot import AotCase


@triton.jit(do_not_specialize=["first", "grid_t", "grid_h", "grid_w", "tile_t", "tile_h", "tile_w"])
def _patchify_kernel(
    video_ptr, tokens_ptr, first, channels, grid_t, grid_h, grid_w, tile_t, tile_h, tile_w,
    stride_c, stride_t, stride_h, stride_w, stride_n,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, TO_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """tokens[first + place(i, j, k), (c, a, b, d)] <-> video[c, i*PT + a, j*PH + b, k*PW + d].

    One program takes BLOCK_W tokens of one (i, j) row. `place` is the closed form of tile order
    (`sora_kernels.packing.tiles`); a tile as large as the grid is raster order.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_w = tl.cdiv(grid_w, BLOCK_W)
    i = pid // blocks_w // grid_h
    j = pid // blocks_w % grid_h
    k = pid % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    t0 = i // tile_t * tile_t
    h0 = j // tile_h * tile_h
    w0 = k // tile_w * tile_w
    ta = tl.minimum(tile_t, grid_t - t0)
    tb = tl.minimum(tile_h, grid_h - h0)
    tc = tl.minimum(tile_w, grid_w - w0)
    place = t0 * grid_h * grid_w + ta * h0 * grid_w + ta * tb * w0
    place += ((i - t0) * tb + (j - h0)) * tc + (k - w0)

    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = f % PW
    b = f // PW % PH
    a = f // (PW * PH) % PT
    c = (f // (PW * PH * PT)).to(tl.int64)
    mask = (k < grid_w)[:, None] & (c < channels)[None, :]
    tokens = tokens_ptr + (first + place)[:, None] * stride_n + f[None, :]
    feature = c * stride_c + (i * PT + a) * stride_t + (j * PH + b) * stride_h + d * stride_w
    pixels = video_ptr + (k * PW * stride_w)[:, None] + feature[None, :]
    if TO_TOKENS:
        tl.store(tokens, tl.load(pixels, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(pixels, tl.load(tokens, mask=mask, other=0.0), mask=mask)


def _copy(
    videos: Sequence[Tensor], tokens: Tensor, grids: Sequence[int], tiles: Sequence[int],
    patch: Sequence[int], to_tokens: bool,
) -> None:  # fmt: skip
    """One launch per video; sizes are host integers, so nothing waits for the device."""
    first = 0
    channels = videos[0].shape[0]
    pt, ph, pw = patch
    for n, video in enumerate(videos):
        t, h, w = grids[3 * n : 3 * n + 3]
        config = choose_config(w, tokens.shape[1], chip_of(tokens))
        rows = t * h * cdiv(w, config.block_w)
        launch(
            _patchify_kernel, (rows, cdiv(tokens.shape[1], config.block_f)), tokens.device,
            video, tokens, first, channels, t, h, w, *tiles[3 * n : 3 * n + 3],
            *video.stride(), tokens.stride(0),
            PT=pt, PH=ph, PW=pw, TO_TOKENS=to_tokens,
            BLOCK_W=config.block_w, BLOCK_F=config.block_f,
            num_warps=config.num_warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        first += t * h * w


def forward(
    videos: Sequence[Tensor], grids: Sequence[int], tiles: Sequence[int], patch: Sequence[int]
) -> Tensor:
    from . import new_tokens

    tokens = new_tokens(videos, grids, patch)
    _copy(videos, tokens, grids, tiles, patch, True)
    return tokens


def backward(
    tokens: Tensor, grids: Sequence[int], tiles: Sequence[int], patch: Sequence[int], channels: int
) -> list[Tensor]:
    from . import new_videos

    videos = new_videos(tokens, grids, patch, channels)
    if videos:
        _copy(videos, tokens, grids, tiles, patch, False)
    return videos


def aot_cases() -> list[AotCase]:
    """Both directions at the patches of real models.

    Not held to 16-byte accesses: a patch row is pw elements, 4 bytes of a bf16 latent, and that is
    all a video has in one piece. The tokens' side is contiguous.
    """
    from ...aot import AotCase

    pointers = {"video_ptr": "*bf16", "tokens_ptr": "*bf16"}
    names = [n for n in _patchify_kernel.arg_names if n.islower() and n not in pointers]
    cases = []
    shapes = (("latent_1x2x2", 16, (1, 2, 2)), ("pixels_1x16x16", 3, (1, 16, 16)))
    for (name, channels, (pt, ph, pw)), to_tokens in product(shapes, (True, False)):
        config = choose_config(52, channels * pt * ph * pw)
        cases.append(
            AotCase(
                name=f"{name}_{'to' if to_tokens else 'from'}_tokens_bf16",
                kernel=_patchify_kernel,
                signature=pointers | dict.fromkeys(names, "i32"),
                constexprs={
                    "PT": pt,
                    "PH": ph,
                    "PW": pw,
                    "TO_TOKENS": to_tokens,
                    "BLOCK_W": config.block_w,
                    "BLOCK_F": config.block_f,
                },
                num_warps=config.num_warps,
                memory_bound=False,
                divisible=(*pointers, "stride_c", "stride_t", "stride_n"),
                enable_fp_fusion=False,
            )
        )
    return cases
