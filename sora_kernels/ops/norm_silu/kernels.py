"""Triton kernels of norm_silu, forward and backward, and their launchers.

Tensors are [B, F, L, C] by strides; one kernel serves channels first and channels last, because a
stride of 1 is a compile-time constant to Triton and chooses the direction of the wide accesses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import load_f32
from .._launch import launch
from . import config, new_like_raw

# Which gradients the backward computes; the bits of `needs`.
DX, DWEIGHT, DBIAS = 1, 2, 4
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)


@triton.jit
def _affine(weight_ptr, bias_ptr, c, mask):
    """weight and bias at channels ``c``; 1 and 0 where there are none."""
    weight = tl.where(mask, 1.0, 0.0)
    bias = tl.zeros_like(weight)
    if weight_ptr is not None:
        weight = load_f32(weight_ptr + c, mask)
    if bias_ptr is not None:
        bias = load_f32(bias_ptr + c, mask)
    return weight, bias


@triton.jit
def _slope(u, dy, SILU: tl.constexpr):
    """dy * silu'(u)."""
    if SILU:
        s = tl.sigmoid(u)
        dy = dy * (s * (1.0 + u * (1.0 - s)))
    return dy


@triton.jit
def _base(region, frames, stride_b, stride_f):
    return (region // frames) * stride_b + (region % frames) * stride_f


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
    x = load_f32(x_ptr + _base(region, frames, x_b, x_f) + l * x_l + c * x_c, mask)
    square = tl.sum(x * x, axis=1, keep_dims=True) / width
    rstd = 1.0 / tl.maximum(tl.sqrt(square + eps), floor)
    tl.store(rstd_ptr + region * length + l, rstd, mask=l < length)
    weight, bias = _affine(weight_ptr, bias_ptr, c, c < width)
    u = x * rstd * weight + bias
    if SILU:
        u = u * tl.sigmoid(u)
    y_offsets = _base(region, frames, y_b, y_f) + l * y_l + c * y_c
    tl.store(y_ptr + y_offsets, u.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_bwd_kernel(
    dy_ptr,  # [B, F, L, C]
    x_ptr,
    rstd_ptr,  # [B * F, L]
    weight_ptr,  # [C] or None
    bias_ptr,
    dx_ptr,  # [B, F, L, C]
    partial_ptr,  # [2, B * F * blocks, C] fp32: sums of du and of du * xhat
    frames, length, width, blocks, chunk,
    d_b, d_f, d_l, d_c,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    ceiling,  # rstd at and above it was clamped
    SILU: tl.constexpr,
    NEEDS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With h = du * weight: dx = rstd * (h - xhat * mean(h * xhat)); rstd * h where floor held."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = tl.arange(0, BLOCK_C)[None, :]
    weight, bias = _affine(weight_ptr, bias_ptr, c, c < width)
    du_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in range(tl.cdiv(end - start, BLOCK_L)):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & (c < width)
        x = load_f32(x_ptr + _base(region, frames, x_b, x_f) + l * x_l + c * x_c, mask)
        dy = load_f32(dy_ptr + _base(region, frames, d_b, d_f) + l * d_l + c * d_c, mask)
        rstd = load_f32(rstd_ptr + region * length + l, l < end)
        xhat = x * rstd
        du = _slope(xhat * weight + bias, dy, SILU)
        if _DBIAS & NEEDS:
            du_sum += tl.sum(du, axis=0, keep_dims=True)
        if _DWEIGHT & NEEDS:
            duxhat_sum += tl.sum(du * xhat, axis=0, keep_dims=True)
        if _DX & NEEDS:
            h = du * weight
            scale = tl.sum(h * xhat, axis=1, keep_dims=True) / width
            dx = rstd * (h - xhat * tl.where(rstd < ceiling, scale, 0.0))
            y_offsets = _base(region, frames, y_b, y_f) + l * y_l + c * y_c
            tl.store(dx_ptr + y_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + pid * width + c
    if _DBIAS & NEEDS:
        tl.store(partial, du_sum, mask=c < width)
    if _DWEIGHT & NEEDS:
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, duxhat_sum, mask=c < width)


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
        x = load_f32(x_ptr + _base(region, frames, x_b, x_f) + l * x_l + c * x_c, mask)
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
    x = load_f32(x_ptr + _base(region, frames, x_b, x_f) + l * x_l + c * x_c, mask)
    xhat = (x - load_f32(mean_ptr + group, c < width)) * load_f32(rstd_ptr + group, c < width)
    weight, bias = _affine(weight_ptr, bias_ptr, c, c < width)
    u = xhat * weight + bias
    if SILU:
        u = u * tl.sigmoid(u)
    y_offsets = _base(region, frames, y_b, y_f) + l * y_l + c * y_c
    tl.store(y_ptr + y_offsets, u.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_bwd_kernel(
    dy_ptr,  # [B, F, L, C]
    x_ptr,
    mean_ptr,  # [B * F, groups]
    rstd_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    c1_ptr,  # [B * F, groups]: means of du * weight and of du * weight * xhat
    c2_ptr,
    dx_ptr,  # [B, F, L, C]; None: the sums instead
    partial_ptr,  # [2, B * F, blocks, C] fp32: sums of du and of du * xhat
    frames, length, width, blocks, chunk, groups,
    d_b, d_f, d_l, d_c,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (du * weight - c1 - xhat * c2), or the sums that c1 and c2 are made from."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    channels = c < width
    group = region * groups + c // (width // groups)
    mean = load_f32(mean_ptr + group, channels)
    rstd = load_f32(rstd_ptr + group, channels)
    weight, bias = _affine(weight_ptr, bias_ptr, c, channels)
    if dx_ptr is not None:
        c1 = load_f32(c1_ptr + group, channels)
        c2 = load_f32(c2_ptr + group, channels)
    du_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in range(tl.cdiv(end - start, BLOCK_L)):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & channels
        x = load_f32(x_ptr + _base(region, frames, x_b, x_f) + l * x_l + c * x_c, mask)
        dy = load_f32(dy_ptr + _base(region, frames, d_b, d_f) + l * d_l + c * d_c, mask)
        xhat = (x - mean) * rstd
        du = _slope(xhat * weight + bias, dy, SILU)
        if dx_ptr is not None:
            dx = rstd * (du * weight - c1 - xhat * c2)
            y_offsets = _base(region, frames, y_b, y_f) + l * y_l + c * y_c
            tl.store(dx_ptr + y_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            du_sum += tl.sum(du, axis=0, keep_dims=True)
            duxhat_sum += tl.sum(du * xhat, axis=0, keep_dims=True)
    if dx_ptr is None:
        partial = partial_ptr + pid * width + c
        tl.store(partial, du_sum, mask=channels)
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, duxhat_sum, mask=channels)


def _strides(x: Tensor, last: bool) -> tuple[int, ...]:
    """Of [B, F, L, C]; the unit one is exact even where that dimension has size 1."""
    b, f, l, c = x.stride()  # noqa: E741
    return (b, f, l, 1) if last else (b, f, 1, c)


def _result(x: Tensor, last: bool) -> tuple[Tensor, tuple[int, ...]]:
    """New memory for y or dx and its strides as [B, F, L, C]."""
    out = new_like_raw(x, last)
    return out, _strides(out if last else out.permute(0, 2, 3, 1), last)


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
    y, y_strides = _result(x, channels_last)
    x_strides = _strides(x, channels_last)
    if groups == 0:
        rstd = x.new_empty(regions * length, dtype=torch.float32)
        block_l, block_c, num_warps = config.rms(width, channels_last)
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
    block_l, block_c, num_warps = config.group(width, channels_last)
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
    block_l, block_c, num_warps = config.group(width, channels_last)
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


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    floor: float,
    silu: bool,
    channels_last: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op norm_silu_bwd: (dx, dweight, dbias), empty where ``needs`` lacks the bit."""
    batch, frames, length, width = x.shape
    regions = batch * frames
    empty = x.new_empty(0, dtype=torch.float32)
    dx, strides = _result(x, channels_last) if needs & DX else (empty, (0, 0, 0, 0))
    if groups:
        block_l, block_c, num_warps = config.group(width, channels_last)
    else:
        block_l, block_c, num_warps = config.rms(width, channels_last, backward=True)
    chunk = config.chunk(length, block_l, regions)
    blocks = triton.cdiv(length, chunk)
    all_strides = (*_strides(dy, channels_last), *_strides(x, channels_last), *strides)
    partial = x.new_empty(2, regions, blocks, width, dtype=torch.float32)
    sizes = (frames, length, width, blocks, chunk)
    meta = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    blocking = {"SILU": silu, "BLOCK_L": block_l, "BLOCK_C": block_c}
    if groups == 0:
        launch(
            _rms_bwd_kernel, (regions * blocks,), x.device,
            dy, x, rstd, weight, bias, dx, partial, *sizes, *all_strides,
            (1 - 1e-6) / floor if floor else float("inf"),
            NEEDS=needs, **blocking, **meta,
        )  # fmt: skip
    else:
        grid = (regions * blocks, triton.cdiv(width, block_c))
        launch(
            _group_bwd_kernel, grid, x.device,
            dy, x, mean, rstd, weight, bias, None, None, None, partial, *sizes, groups,
            *all_strides, **blocking, **meta,
        )  # fmt: skip
        if needs & DX:
            sums = partial.sum(2)  # [2, regions, C], in a fixed order
            if weight is not None:
                sums = sums * weight.float()
            means = sums.view(2, -1, width // groups).mean(-1) / length
            launch(
                _group_bwd_kernel, grid, x.device,
                dy, x, mean, rstd, weight, bias, means[0], means[1], dx, None, *sizes, groups,
                *all_strides, **blocking, **meta,
            )  # fmt: skip
    return (
        dx,
        partial[1].sum((0, 1)) if needs & DWEIGHT else empty.new_empty(0),
        partial[0].sum((0, 1)) if needs & DBIAS else empty.new_empty(0),
    )


def aot_cases() -> list[AotCase]:
    """Wan's VAE (RMS of 96 and 384 channels, channels last) and GroupNorm of 32 groups, bf16."""
    cases = []
    for width in (96, 384):
        cases += [_rms_case(width, False), _rms_case(width, True)]
    cases += [_rms_case(128, False, last=False), _rms_case(128, True, last=False)]
    for last in (True, False):
        cases += _group_cases(256, last)
    return cases


def _case(
    name: str,
    kernel: Any,
    tile: config.Config,
    last: bool,
    tensors: str,
    pointers: str,
    scalars: str,
    constants: dict[str, object],
    narrow_store_ok: bool = False,
) -> AotCase:
    """``tensors`` and ``pointers`` name bf16 and fp32 pointers, ``scalars`` integers."""
    unit = "c" if last else "l"
    given = dict.fromkeys(tensors.split(), "*bf16") | dict.fromkeys(pointers.split(), "*fp32")
    names = [n for n in kernel.arg_names if n[1:] in ("_b", "_f", "_l", "_c")]
    strides = [n for n in names if n[2] != unit]
    floats = [n for n in kernel.arg_names if n in ("eps", "floor", "ceiling")]
    return AotCase(
        name=f"{name}_{'last' if last else 'first'}",
        kernel=kernel,
        signature=given
        | dict.fromkeys((*scalars.split(), *strides), "i32")
        | dict.fromkeys(floats, "fp32"),
        constexprs=constants
        | dict.fromkeys([n for n in names if n[2] == unit], 1)
        | {"BLOCK_L": tile.block_l, "BLOCK_C": tile.block_c},
        num_warps=tile.num_warps,
        divisible=(*given, *strides, *({"length", "width", "chunk"} & set(scalars.split()))),
        narrow_store_ok=narrow_store_ok,
    )  # fmt: skip


def _rms_case(width: int, backward: bool, last: bool = True) -> AotCase:
    tile = config.rms(width, last, backward)
    if backward:
        return _case(
            f"rms_bwd_c{width}", _rms_bwd_kernel, tile, last, "dy_ptr x_ptr weight_ptr dx_ptr",
            "rstd_ptr partial_ptr", "frames length width blocks chunk",
            {"bias_ptr": None, "SILU": True, "NEEDS": DX | DWEIGHT},
        )  # fmt: skip
    return _case(
        f"rms_fwd_c{width}", _rms_fwd_kernel, tile, last, "x_ptr weight_ptr y_ptr", "rstd_ptr",
        "frames length width blocks", {"bias_ptr": None, "SILU": True},
    )  # fmt: skip


def _group_cases(width: int, last: bool) -> list[AotCase]:
    tile = config.group(width, last)
    silu: dict[str, object] = {"SILU": True}
    return [
        _case(
            f"group_stats_c{width}", _group_stats_kernel, tile, last, "x_ptr", "partial_ptr",
            "frames length width blocks chunk", {}, narrow_store_ok=True,
        ),
        _case(
            f"group_fwd_c{width}", _group_fwd_kernel, tile, last,
            "x_ptr weight_ptr bias_ptr y_ptr", "mean_ptr rstd_ptr",
            "frames length width blocks groups", silu,
        ),
        _case(
            f"group_sums_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr", "mean_ptr rstd_ptr partial_ptr",
            "frames length width blocks chunk groups",
            silu | dict.fromkeys(("c1_ptr", "c2_ptr", "dx_ptr")), narrow_store_ok=True,
        ),
        _case(
            f"group_bwd_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr dx_ptr", "mean_ptr rstd_ptr c1_ptr c2_ptr",
            "frames length width blocks chunk groups", silu | {"partial_ptr": None},
        ),
    ]  # fmt: skip
