"""Triton forward kernels of norm_silu and their launcher.

Tensors are [B, F, L, C] by strides; one kernel serves channels first and channels last, because a
stride of 1 is a compile-time constant to Triton and chooses the direction of the wide accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import divide, exp, load_f32
from .._launch import cdiv, launch
from . import config
from .device import affine, case, groups_of, load_tile, new_result, store_tile, strides_of
from .kernels_bwd import aot_cases_bwd, backward

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _activate(u, SILU: tl.constexpr):
    """u * sigmoid(u)."""
    if SILU:
        u = divide(u, 1.0 + exp(-u))
    return u


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["frames"])
def _rms_fwd_kernel(
    x_ptr,  # [B, F, L, C]
    weight_ptr,  # [C] or None
    bias_ptr,
    y_ptr,  # [B, F, L, C]
    rstd_ptr,  # [B * F, L] fp32
    frames, length, width, blocks,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    eps,
    floor,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REST_C: tl.constexpr,
):  # fmt: skip
    """y = silu(x * rstd * weight + bias), rstd = 1 / max(sqrt(mean(x^2) + eps), floor).

    Channels after the first BLOCK_C, if any, are a block of REST_C of their own: that of 96 or 384
    channels is half as wide, where one block of a power of two would be a quarter empty.
    """
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    l = (pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (l < length) & (c < width)
    x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
    square = tl.sum(x * x, axis=1, keep_dims=True)
    if REST_C:
        more = BLOCK_C + tl.arange(0, REST_C)[None, :]
        more_mask = (l < length) & (more < width)
        rest = load_tile(x_ptr, region, frames, l, more, x_b, x_f, x_l, x_c, more_mask)
        square += tl.sum(rest * rest, axis=1, keep_dims=True)
    # A NaN among the channels makes all of them NaN, as it does in PyTorch.
    norm = tl.sqrt(square / width + eps)
    rstd = 1.0 / tl.maximum(norm, floor, propagate_nan=tl.PropagateNan.ALL)
    tl.store(rstd_ptr + region * length + l, rstd, mask=l < length)
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    u = _activate(x * rstd * weight + bias, SILU)
    store_tile(y_ptr, u, region, frames, l, c, y_b, y_f, y_l, y_c, mask)
    if REST_C:
        weight, bias = affine(weight_ptr, bias_ptr, more, more < width)
        u = _activate(rest * rstd * weight + bias, SILU)
        store_tile(y_ptr, u, region, frames, l, more, y_b, y_f, y_l, y_c, more_mask)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["frames"])
def _group_stats_kernel(
    x_ptr,  # [B, F, L, C]
    partial_ptr,  # [2, B * F, blocks, C] fp32: means of a block, squares around them
    frames, length, width, blocks, chunk,
    x_b, x_f, x_l, x_c,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every channel's mean and M2 over a block.

    Each place of the tile keeps its own (Welford 1962), merged at the end (Chan, Golub, LeVeque
    1979), so that the loop sends nothing between threads.
    """
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    end = tl.minimum(start + chunk, length)
    places = tl.arange(0, BLOCK_L)[:, None]
    mean = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    tiles = tl.cdiv((end - start).to(tl.int32), BLOCK_L)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        l = start + tile * BLOCK_L + places  # noqa: E741
        mask = (l < end) & (c < width)
        x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
        apart = tl.where(l < end, x - mean, 0.0)
        share = 1.0 / (tile + 1.0)
        mean += apart * share
        m2 += apart * apart * (1.0 - share)
    outside = places + (tiles - 1) * BLOCK_L >= end - start  # in the last tile
    seen = (tiles - outside.to(tl.int32)).to(tl.float32)
    whole = tl.sum(mean * (seen / (end - start).to(tl.float32)), axis=0, keep_dims=True)
    apart = mean - whole
    m2 = tl.sum(m2 + apart * apart * seen, axis=0, keep_dims=True)
    partial = partial_ptr + pid * width + c
    tl.store(partial, whole, mask=c < width)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * width, m2, mask=c < width)


@triton.jit(do_not_specialize=["blocks", "length", "chunk"])
def _group_merge_kernel(
    partial_ptr,  # [2, B * F, blocks, C] fp32
    mean_ptr,  # [B * F, groups] fp32
    rstd_ptr,
    length, width, blocks, chunk,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one group from those of its channels over blocks."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // (width // GROUP)
    first = region * blocks * width + pid % (width // GROUP) * GROUP
    squares_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * blocks * GROUP
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, blocks * GROUP, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = tl.minimum(length - i // GROUP * chunk, chunk).to(tl.float32)
        at = first + (i // GROUP).to(tl.int64) * width + i % GROUP
        total += tl.load(partial_ptr + at, mask=i < blocks * GROUP, other=0.0) * count
    elements = length.to(tl.float32) * GROUP
    mean = tl.sum(total, axis=0) / elements
    m2 = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, blocks * GROUP, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < blocks * GROUP
        count = tl.minimum(length - i // GROUP * chunk, chunk).to(tl.float32)
        at = first + (i // GROUP).to(tl.int64) * width + i % GROUP
        apart = tl.load(partial_ptr + at, mask=inside, other=0.0) - mean
        m2 += tl.where(inside, apart * apart * count, 0.0)
        m2 += tl.load(squares_ptr + at, mask=inside, other=0.0)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(tl.sum(m2, axis=0) / elements + eps))


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["frames"])
def _group_fwd_kernel(
    x_ptr,  # [B, F, L, C]
    mean_ptr,  # [B * F, groups] fp32
    rstd_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    y_ptr,  # [B, F, L, C]
    frames, length, width, blocks,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * rstd * weight + bias), one tile."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    l = (pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (l < length) & (c < width)
    group = groups_of(region, c, width, GROUP)
    x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
    xhat = (x - load_f32(mean_ptr + group, c < width)) * load_f32(rstd_ptr + group, c < width)
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    u = _activate(xhat * weight + bias, SILU)
    store_tile(y_ptr, u, region, frames, l, c, y_b, y_f, y_l, y_c, mask)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    floor: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op norm_silu_fwd: (y, mean, rstd); mean is empty for RMS."""
    batch, frames, length, width = x.shape
    regions = batch * frames
    y, y_strides = new_result(x, channels_last)
    x_strides = strides_of(x, channels_last)
    if groups == 0:
        rstd = x.new_empty(regions * length, dtype=torch.float32)
        block_l, _, num_warps = config.rms(width, channels_last, chip=config.chip_of(x))
        block_c, rest_c = config.columns(width)
        blocks = cdiv(length, block_l)
        launch(
            _rms_fwd_kernel, (regions * blocks,), x.device,
            x, weight, bias, y, rstd, frames, length, width, blocks, *x_strides, *y_strides,
            eps, floor,
            SILU=silu, BLOCK_L=block_l, BLOCK_C=block_c, REST_C=rest_c,
            num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        return y, x.new_empty(0, dtype=torch.float32), rstd
    mean, rstd = _group_stats(x, x_strides, groups, eps, channels_last)
    block_l, block_c, num_warps = config.group(width, channels_last, config.chip_of(x))
    blocks = cdiv(length, block_l)
    launch(
        _group_fwd_kernel, (regions * blocks, cdiv(width, block_c)), x.device,
        x, mean, rstd, weight, bias, y, frames, length, width, blocks, *x_strides, *y_strides,
        SILU=silu, GROUP=width // groups, BLOCK_L=block_l, BLOCK_C=block_c,
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y, mean, rstd


def _group_stats(
    x: Tensor, x_strides: tuple[int, ...], groups: int, eps: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Mean and rstd ``[B * F * groups]``, merged from those of channels over blocks."""
    batch, frames, length, width = x.shape
    regions = batch * frames
    tile = config.group(width, channels_last, config.chip_of(x))
    block_l, block_c, num_warps = tile
    chunk = config.chunk(length, block_l, regions * cdiv(width, block_c))
    blocks = cdiv(length, chunk)
    partial = x.new_empty(2, regions, blocks, width, dtype=torch.float32)
    launch(
        _group_stats_kernel, (regions * blocks, cdiv(width, block_c)), x.device,
        x, partial, frames, length, width, blocks, chunk, *x_strides,
        BLOCK_L=block_l, BLOCK_C=block_c, STAGES=config.stages(tile, 1, x.element_size()),
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    mean = x.new_empty(regions * groups, dtype=torch.float32)
    rstd = x.new_empty(regions * groups, dtype=torch.float32)
    launch(
        _group_merge_kernel, (regions * groups,), x.device,
        partial, mean, rstd, length, width, blocks, chunk, eps,
        GROUP=width // groups, BLOCK=config.MERGE, num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, rstd


def aot_cases() -> list[AotCase]:
    """Wan's VAE (RMS of 96 and 384 channels, channels last) and GroupNorm of 32 groups, bf16."""
    cases = [_rms_case(96), _rms_case(384), _rms_case(128, last=False)]
    for last in (True, False):
        cases += _group_cases(256, last)
    return cases + aot_cases_bwd()


def _rms_case(width: int, last: bool = True) -> AotCase:
    block_c, rest_c = config.columns(width)
    return case(
        f"rms_fwd_c{width}", _rms_fwd_kernel, config.rms(width, last)._replace(block_c=block_c),
        last, "x_ptr weight_ptr y_ptr", "rstd_ptr", "frames length width blocks",
        {"bias_ptr": None, "SILU": True, "REST_C": rest_c},
    )  # fmt: skip


def _group_cases(width: int, last: bool) -> list[AotCase]:
    tile = config.group(width, last)
    return [
        case(
            f"group_stats_c{width}", _group_stats_kernel, tile, last, "x_ptr", "partial_ptr",
            "frames length width blocks chunk", {"STAGES": config.stages(tile, 1, 2)},
            narrow_store_ok=True,
        ),
        case(
            f"group_merge_c{width}", _group_merge_kernel, tile, last, "",
            "partial_ptr mean_ptr rstd_ptr", "length width blocks chunk",
            {"GROUP": width // 32, "BLOCK": config.MERGE}, small=True,
        ),
        case(
            f"group_fwd_c{width}", _group_fwd_kernel, tile, last,
            "x_ptr weight_ptr bias_ptr y_ptr", "mean_ptr rstd_ptr",
            "frames length width blocks", {"SILU": True, "GROUP": width // 32},
        ),
    ]  # fmt: skip
