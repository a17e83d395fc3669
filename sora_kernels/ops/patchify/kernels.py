"""Triton kernel of patchify and unpatchify: one copy between a video and its rows of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, launch
from .config import chip_of, choose_config

if TYPE_CHECKING:
    from ...aot import AotCase


@triton.jit
def _patch_rows(
    row, i, j, stride_c, stride_t, stride_h, PT: tl.constexpr, PH: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Where rows (c, a, b) of the patches of grid row (i, j) begin. Strides in units of UNIT."""
    b = row % PH
    a = row // PH % PT
    c = (row // (PH * PT)).to(tl.int64)
    return (c * stride_c + (i * PT + a) * stride_t + (j * PH + b) * stride_h) * UNIT


@triton.jit(
    do_not_specialize=[
        "first",
        "grid_t",
        "grid_h",
        "grid_w",
        "units_w",
        "tile_t",
        "tile_h",
        "tile_w",
    ]
)
def _patchify_kernel(
    video_ptr, tokens_ptr, first, channels, grid_t, grid_h, grid_w, units_w,
    tile_t, tile_h, tile_w,
    stride_c, stride_t, stride_h, stride_w, stride_n,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, TO_TOKENS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """tokens[first + place(i, j, k), (c, a, b, d)] <-> video[c, i*PT + a, j*PH + b, k*PW + d].

    One program takes BLOCK_W tokens of one (i, j) row. `place` is the closed form of tile order
    (`sora_kernels.packing.tiles`); a tile as large as the grid is raster order. A tile is read and
    written each time along what is contiguous there, and transposed in between. A video's width and
    strides come in units of UNIT numbers: Triton knows that 13 * 8 is a multiple of 8, not that 104
    is.
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
    tokens = tokens_ptr + (first + place)[:, None] * stride_n + f[None, :]
    inside = (k < grid_w)[:, None] & (f < channels * PT * PH * PW)[None, :]
    if (
        PW & (PW - 1) or PW > BLOCK_F
    ):  # no tile of whole patch rows: a token's features, pixel by pixel
        at = _patch_rows(f // PW, i, j, stride_c, stride_t, stride_h, PT, PH, UNIT)
        pixels = video_ptr + (k * PW * stride_w)[:, None] + (at + f % PW * stride_w)[None, :]
        if TO_TOKENS:
            tl.store(tokens, tl.load(pixels, mask=inside, other=0.0), mask=inside)
        else:
            tl.store(pixels, tl.load(tokens, mask=inside, other=0.0), mask=inside)
    else:
        rows: tl.constexpr = BLOCK_F // PW
        row = tl.program_id(1) * rows + tl.arange(0, rows)
        column = (pid % blocks_w * BLOCK_W * PW) + tl.arange(0, BLOCK_W * PW)
        at = _patch_rows(row, i, j, stride_c, stride_t, stride_h, PT, PH, UNIT)
        pixels = video_ptr + at[:, None] + (column * stride_w)[None, :]
        visible = (row < channels * PT * PH)[:, None] & (column < units_w * UNIT)[None, :]
        if TO_TOKENS:
            value = tl.load(pixels, mask=visible, other=0.0)
            value = tl.permute(tl.reshape(value, [rows, BLOCK_W, PW]), [1, 0, 2])
            tl.store(tokens, tl.reshape(value, [BLOCK_W, BLOCK_F]), mask=inside)
        else:
            value = tl.load(tokens, mask=inside, other=0.0)
            value = tl.permute(tl.reshape(value, [BLOCK_W, rows, PW]), [1, 0, 2])
            tl.store(pixels, tl.reshape(value, [rows, BLOCK_W * PW]), mask=visible)


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
        c_stride, t_stride, h_stride, w_stride = video.stride()
        unit = gcd(8, c_stride, t_stride, h_stride, w * pw)
        launch(
            _patchify_kernel, (rows, cdiv(tokens.shape[1], config.block_f)), tokens.device,
            video, tokens, first, channels, t, h, w, w * pw // unit, *tiles[3 * n : 3 * n + 3],
            c_stride // unit, t_stride // unit, h_stride // unit, w_stride, tokens.stride(0),
            PT=pt, PH=ph, PW=pw, TO_TOKENS=to_tokens, UNIT=unit,
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
    """Both directions at the patches of real models."""
    from ...aot import AotCase

    pointers = {"video_ptr": "*bf16", "tokens_ptr": "*bf16"}
    names = [
        n for n in _patchify_kernel.arg_names if n.islower() and n not in (*pointers, "stride_w")
    ]
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
                    "UNIT": 8,
                    "stride_w": 1,
                    "BLOCK_W": config.block_w,
                    "BLOCK_F": config.block_f,
                },
                num_warps=config.num_warps,
                divisible=(*pointers, "stride_n", *(["channels"] if channels % 16 == 0 else [])),
                enable_fp_fusion=False,
            )
        )
    return cases
