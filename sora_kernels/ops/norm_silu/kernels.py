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
from .._device import load_f32
from .._launch import launch
from . import config
from .device import affine, case, load_tile, new_result, store_tile, strides_of
from .kernels_bwd import aot_cases_bwd, backward

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
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
):  # fmt: skip
    """y = silu(x * rstd * weight + bias), rstd = 1 / max(sqrt(mean(x^2) + eps), floor)."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    l = (pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (l < length) & (c < width)
    x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
    square = tl.sum(x * x, axis=1, keep_dims=True) / width
    rstd = 1.0 / tl.maximum(tl.sqrt(square + eps), floor)
    tl.store(rstd_ptr + region * length + l, rstd, mask=l < length)
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    u = x * rstd * weight + bias
    if SILU:
        u = u * tl.sigmoid(u)
    store_tile(y_ptr, u, region, frames, l, c, y_b, y_f, y_l, y_c, mask)


@triton.jit
def _group_stats_kernel(
    x_ptr,  # [B, F, L, C]
    partial_ptr,  # [2, B * F, blocks, C] fp32: means of a block, squares around them
    frames, length, width, blocks, chunk,
    x_b, x_f, x_l, x_c,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every channel's mean and M2 over a block, tile by tile (Chan, Golub, LeVeque 1979)."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    end = tl.minimum(start + chunk, length)
    mean = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    for tile in range(tl.cdiv(end - start, BLOCK_L)):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & (c < width)
        x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
        left = end - start - tile * BLOCK_L
        seen = (end - start - left).to(tl.float32)
        new = tl.minimum(left, BLOCK_L).to(tl.float32)
        tile_mean = tl.sum(x, axis=0, keep_dims=True) / new
        centred = tl.where(mask, x - tile_mean, 0.0)
        apart = tile_mean - mean
        mean += apart * (new / (seen + new))
        m2 += tl.sum(centred * centred, axis=0, keep_dims=True)
        m2 += apart * apart * (seen * new / (seen + new))
    partial = partial_ptr + pid * width + c
    tl.store(partial, mean, mask=c < width)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * width, m2, mask=c < width)


@triton.jit
def _group_fwd_kernel(
    x_ptr,  # [B, F, L, C]
    mean_ptr,  # [B * F, groups] fp32
    rstd_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    y_ptr,  # [B, F, L, C]
    frames, length, width, blocks, groups,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * rstd * weight + bias), one tile."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    l = (pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (l < length) & (c < width)
    group = region * groups + c // (width // groups)
    x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
    xhat = (x - load_f32(mean_ptr + group, c < width)) * load_f32(rstd_ptr + group, c < width)
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    u = xhat * weight + bias
    if SILU:
        u = u * tl.sigmoid(u)
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
        block_l, block_c, num_warps = config.rms(width, channels_last, chip=config.chip_of(x))
        blocks = triton.cdiv(length, block_l)
        launch(
            _rms_fwd_kernel, (regions * blocks,), x.device,
            x, weight, bias, y, rstd, frames, length, width, blocks, *x_strides, *y_strides,
            eps, floor,
            SILU=silu, BLOCK_L=block_l, BLOCK_C=block_c,
            num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        return y, x.new_empty(0, dtype=torch.float32), rstd
    mean, rstd = _group_stats(x, x_strides, groups, eps, channels_last)
    block_l, block_c, num_warps = config.group(width, channels_last, config.chip_of(x))
    blocks = triton.cdiv(length, block_l)
    launch(
        _group_fwd_kernel, (regions * blocks, triton.cdiv(width, block_c)), x.device,
        x, mean, rstd, weight, bias, y, frames, length, width, blocks, groups,
        *x_strides, *y_strides,
        SILU=silu, BLOCK_L=block_l, BLOCK_C=block_c,
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y, mean, rstd


def _group_stats(
    x: Tensor, x_strides: tuple[int, ...], groups: int, eps: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Mean and rstd ``[B * F * groups]``, merged from those of channels over blocks."""
    batch, frames, length, width = x.shape
    regions = batch * frames
    block_l, block_c, num_warps = config.group(width, channels_last, config.chip_of(x))
    chunk = config.chunk(length, block_l, regions)
    blocks = triton.cdiv(length, chunk)
    partial = x.new_empty(2, regions, blocks, groups, width // groups, dtype=torch.float32)
    launch(
        _group_stats_kernel, (regions * blocks, triton.cdiv(width, block_c)), x.device,
        x, partial, frames, length, width, blocks, chunk, *x_strides,
        BLOCK_L=block_l, BLOCK_C=block_c,
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    counts = torch.arange(blocks, device=x.device).mul_(-chunk).add_(length).clamp_(max=chunk)
    counts = counts.float().view(1, blocks, 1, 1)
    count = length * (width // groups)
    mean = (partial[0] * counts).sum((1, 3), keepdim=True) / count
    m2 = (partial[1] + counts * (partial[0] - mean).square()).sum((1, 3))
    return mean.view(-1), torch.rsqrt(m2 / count + eps).view(-1)


def aot_cases() -> list[AotCase]:
    """Wan's VAE (RMS of 96 and 384 channels, channels last) and GroupNorm of 32 groups, bf16."""
    cases = [_rms_case(96), _rms_case(384), _rms_case(128, last=False)]
    for last in (True, False):
        cases += _group_cases(256, last)
    return cases + aot_cases_bwd()


def _rms_case(width: int, last: bool = True) -> AotCase:
    return case(
        f"rms_fwd_c{width}", _rms_fwd_kernel, config.rms(width, last), last,
        "x_ptr weight_ptr y_ptr", "rstd_ptr", "frames length width blocks",
        {"bias_ptr": None, "SILU": True},
    )  # fmt: skip


def _group_cases(width: int, last: bool) -> list[AotCase]:
    tile = config.group(width, last)
    return [
        case(
            f"group_stats_c{width}", _group_stats_kernel, tile, last, "x_ptr", "partial_ptr",
            "frames length width blocks chunk", {}, narrow_store_ok=True,
        ),
        case(
            f"group_fwd_c{width}", _group_fwd_kernel, tile, last,
            "x_ptr weight_ptr bias_ptr y_ptr", "mean_ptr rstd_ptr",
            "frames length width blocks groups", {"SILU": True},
        ),
    ]  # fmt: skip
