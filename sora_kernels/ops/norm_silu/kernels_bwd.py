"""Triton backward kernels of norm_silu and their launcher."""

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

# Which gradients the backward computes; the bits of `needs`.
DX, DWEIGHT, DBIAS = 1, 2, 4
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)


@triton.jit
def slope(u, dy, SILU: tl.constexpr):
    """dy * silu'(u)."""
    if SILU:
        s = tl.sigmoid(u)
        dy = dy * (s * (1.0 + u * (1.0 - s)))
    return dy


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
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    du_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in range(tl.cdiv(end - start, BLOCK_L)):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & (c < width)
        x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
        dy = load_tile(dy_ptr, region, frames, l, c, d_b, d_f, d_l, d_c, mask)
        rstd = load_f32(rstd_ptr + region * length + l, l < end)
        xhat = x * rstd
        du = slope(xhat * weight + bias, dy, SILU)
        if _DBIAS & NEEDS:
            du_sum += tl.sum(du, axis=0, keep_dims=True)
        if _DWEIGHT & NEEDS:
            duxhat_sum += tl.sum(du * xhat, axis=0, keep_dims=True)
        if _DX & NEEDS:
            h = du * weight
            scale = tl.sum(h * xhat, axis=1, keep_dims=True) / width
            dx = rstd * (h - xhat * tl.where(rstd < ceiling, scale, 0.0))
            store_tile(dx_ptr, dx, region, frames, l, c, y_b, y_f, y_l, y_c, mask)
    partial = partial_ptr + pid * width + c
    if _DBIAS & NEEDS:
        tl.store(partial, du_sum, mask=c < width)
    if _DWEIGHT & NEEDS:
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, duxhat_sum, mask=c < width)


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
    weight, bias = affine(weight_ptr, bias_ptr, c, channels)
    if dx_ptr is not None:
        c1 = load_f32(c1_ptr + group, channels)
        c2 = load_f32(c2_ptr + group, channels)
    du_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([1, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in range(tl.cdiv(end - start, BLOCK_L)):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & channels
        x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
        dy = load_tile(dy_ptr, region, frames, l, c, d_b, d_f, d_l, d_c, mask)
        xhat = (x - mean) * rstd
        du = slope(xhat * weight + bias, dy, SILU)
        if dx_ptr is not None:
            dx = rstd * (du * weight - c1 - xhat * c2)
            store_tile(dx_ptr, dx, region, frames, l, c, y_b, y_f, y_l, y_c, mask)
        else:
            du_sum += tl.sum(du, axis=0, keep_dims=True)
            duxhat_sum += tl.sum(du * xhat, axis=0, keep_dims=True)
    if dx_ptr is None:
        partial = partial_ptr + pid * width + c
        tl.store(partial, du_sum, mask=channels)
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, duxhat_sum, mask=channels)


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
    dx, strides = new_result(x, channels_last) if needs & DX else (empty, (0, 0, 0, 0))
    if groups:
        block_l, block_c, num_warps = config.group(width, channels_last, config.chip_of(x))
    else:
        block_l, block_c, num_warps = config.rms(width, channels_last, True, config.chip_of(x))
    chunk = config.chunk(length, block_l, regions)
    blocks = triton.cdiv(length, chunk)
    all_strides = (*strides_of(dy, channels_last), *strides_of(x, channels_last), *strides)
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


def aot_cases_bwd() -> list[AotCase]:
    """The backward of the shapes in kernels.aot_cases."""
    cases = [_rms_case(96), _rms_case(384), _rms_case(128, last=False)]
    for last in (True, False):
        cases += _group_cases(256, last)
    return cases


def _rms_case(width: int, last: bool = True) -> AotCase:
    return case(
        f"rms_bwd_c{width}", _rms_bwd_kernel, config.rms(width, last, backward=True), last,
        "dy_ptr x_ptr weight_ptr dx_ptr", "rstd_ptr partial_ptr",
        "frames length width blocks chunk",
        {"bias_ptr": None, "SILU": True, "NEEDS": DX | DWEIGHT},
    )  # fmt: skip


def _group_cases(width: int, last: bool) -> list[AotCase]:
    tile = config.group(width, last)
    silu: dict[str, object] = {"SILU": True}
    return [
        case(
            f"group_sums_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr", "mean_ptr rstd_ptr partial_ptr",
            "frames length width blocks chunk groups",
            silu | dict.fromkeys(("c1_ptr", "c2_ptr", "dx_ptr")), narrow_store_ok=True,
        ),
        case(
            f"group_bwd_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr dx_ptr", "mean_ptr rstd_ptr c1_ptr c2_ptr",
            "frames length width blocks chunk groups", silu | {"partial_ptr": None},
        ),
    ]  # fmt: skip
