"""Triton backward kernels of norm_silu and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._device import load_f32, sigmoid
from .._launch import cdiv, launch
from . import config
from .device import affine, case, groups_of, load_tile, new_result, store_tile, strides_of

# Which gradients the backward computes; the bits of `needs`.
DX, DWEIGHT, DBIAS = 1, 2, 4
_DX, _DWEIGHT, _DBIAS = tl.constexpr(DX), tl.constexpr(DWEIGHT), tl.constexpr(DBIAS)


@triton.jit
def slope(u, dy, SILU: tl.constexpr):
    """dy * silu'(u)."""
    if SILU:
        s = sigmoid(u)
        dy = dy * (s * (1.0 + u * (1.0 - s)))
    return dy


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["frames"])
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
    STAGES: tl.constexpr,
):  # fmt: skip
    """With h = du * weight: dx = rstd * (h - xhat * mean(h * xhat)); rstd * h where floor held."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = tl.arange(0, BLOCK_C)[None, :]
    weight, bias = affine(weight_ptr, bias_ptr, c, c < width)
    du_sum = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in tl.range(0, tl.cdiv((end - start).to(tl.int32), BLOCK_L), num_stages=STAGES):
        l = (start + tile * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]  # noqa: E741
        mask = (l < end) & (c < width)
        x = load_tile(x_ptr, region, frames, l, c, x_b, x_f, x_l, x_c, mask)
        dy = load_tile(dy_ptr, region, frames, l, c, d_b, d_f, d_l, d_c, mask)
        rstd = load_f32(rstd_ptr + region * length + l, l < end)
        xhat = x * rstd
        du = slope(xhat * weight + bias, dy, SILU)
        if _DBIAS & NEEDS:
            du_sum += du
        if _DWEIGHT & NEEDS:
            duxhat_sum += du * xhat
        if _DX & NEEDS:
            h = du * weight
            scale = tl.sum(h * xhat, axis=1, keep_dims=True) / width
            dx = rstd * (h - xhat * tl.where(rstd < ceiling, scale, 0.0))
            store_tile(dx_ptr, dx, region, frames, l, c, y_b, y_f, y_l, y_c, mask)
    partial = partial_ptr + pid * width + c
    if _DBIAS & NEEDS:
        tl.store(partial, tl.sum(du_sum, axis=0, keep_dims=True), mask=c < width)
    if _DWEIGHT & NEEDS:
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, tl.sum(duxhat_sum, axis=0, keep_dims=True), mask=c < width)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["frames"])
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
    frames, length, width, blocks, chunk,
    d_b, d_f, d_l, d_c,
    x_b, x_f, x_l, x_c,
    y_b, y_f, y_l, y_c,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (du * weight - c1 - xhat * c2), or the sums that c1 and c2 are made from."""
    pid = tl.program_id(0).to(tl.int64)
    region = pid // blocks
    start = pid % blocks * chunk
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    channels = c < width
    group = groups_of(region, c, width, GROUP)
    mean = load_f32(mean_ptr + group, channels)
    rstd = load_f32(rstd_ptr + group, channels)
    weight, bias = affine(weight_ptr, bias_ptr, c, channels)
    if dx_ptr is not None:
        c1 = load_f32(c1_ptr + group, channels)
        c2 = load_f32(c2_ptr + group, channels)
    du_sum = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    duxhat_sum = tl.zeros([BLOCK_L, BLOCK_C], dtype=tl.float32)
    end = tl.minimum(start + chunk, length)
    for tile in tl.range(0, tl.cdiv((end - start).to(tl.int32), BLOCK_L), num_stages=STAGES):
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
            du_sum += du
            duxhat_sum += du * xhat
    if dx_ptr is None:
        partial = partial_ptr + pid * width + c
        tl.store(partial, tl.sum(du_sum, axis=0, keep_dims=True), mask=channels)
        partial += tl.num_programs(0).to(tl.int64) * width
        tl.store(partial, tl.sum(duxhat_sum, axis=0, keep_dims=True), mask=channels)


@triton.jit(do_not_specialize=["blocks", "length"])
def _group_means_kernel(
    partial_ptr,  # [2, B * F, blocks, C] fp32
    weight_ptr,  # [C] or None
    c1_ptr,  # [B * F, groups] fp32
    c2_ptr,
    length, width, blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """c1 and c2 of one group: its channels' sums over blocks, times weight, over the count."""
    pid = tl.program_id(0).to(tl.int64)
    channel = pid % (width // GROUP) * GROUP
    first = pid // (width // GROUP) * blocks * width + channel
    second_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * blocks * GROUP
    c1 = tl.zeros([BLOCK], dtype=tl.float32)
    c2 = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, blocks * GROUP, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < blocks * GROUP
        at = first + (i // GROUP).to(tl.int64) * width + i % GROUP
        du = tl.load(partial_ptr + at, mask=inside, other=0.0)
        duxhat = tl.load(second_ptr + at, mask=inside, other=0.0)
        if weight_ptr is not None:
            weight = load_f32(weight_ptr + channel + i % GROUP, inside)
            du *= weight
            duxhat *= weight
        c1 += du
        c2 += duxhat
    elements = length.to(tl.float32) * GROUP
    tl.store(c1_ptr + pid, tl.sum(c1, axis=0) / elements)
    tl.store(c2_ptr + pid, tl.sum(c2, axis=0) / elements)


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
        tile = config.group(width, channels_last, config.chip_of(x))
    else:
        tile = config.rms(width, channels_last, True, config.chip_of(x))
    block_l, block_c, num_warps = tile
    chunk = config.chunk(length, block_l, regions * cdiv(width, block_c))
    blocks = cdiv(length, chunk)
    all_strides = (*strides_of(dy, channels_last), *strides_of(x, channels_last), *strides)
    partial = x.new_empty(2, regions, blocks, width, dtype=torch.float32)
    sizes = (frames, length, width, blocks, chunk)
    meta = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    blocking = {"SILU": silu, "BLOCK_L": block_l, "BLOCK_C": block_c}
    blocking["STAGES"] = config.stages(tile, 2, x.element_size())
    if groups == 0:
        launch(
            _rms_bwd_kernel, (regions * blocks,), x.device,
            dy, x, rstd, weight, bias, dx, partial, *sizes, *all_strides,
            (1 - 1e-6) / floor if floor else float("inf"),
            NEEDS=needs, **blocking, **meta,
        )  # fmt: skip
    else:
        grid = (regions * blocks, cdiv(width, block_c))
        blocking["GROUP"] = width // groups
        launch(
            _group_bwd_kernel, grid, x.device,
            dy, x, mean, rstd, weight, bias, None, None, None, partial, *sizes, *all_strides,
            **blocking, **meta,
        )  # fmt: skip
        if needs & DX:
            c1, c2 = x.new_empty(2, regions * groups, dtype=torch.float32)
            launch(
                _group_means_kernel, (regions * groups,), x.device,
                partial, weight, c1, c2, length, width, blocks,
                GROUP=width // groups, BLOCK=config.MERGE, **meta | {"num_warps": 8},
            )  # fmt: skip
            launch(
                _group_bwd_kernel, grid, x.device,
                dy, x, mean, rstd, weight, bias, c1, c2, dx, None, *sizes, *all_strides,
                **blocking, **meta,
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
    tile = config.rms(width, last, backward=True)
    constants: dict[str, object] = {"bias_ptr": None, "SILU": True, "NEEDS": DX | DWEIGHT}
    constants["STAGES"] = config.stages(tile, 2, 2)
    return case(
        f"rms_bwd_c{width}", _rms_bwd_kernel, tile, last,
        "dy_ptr x_ptr weight_ptr dx_ptr", "rstd_ptr partial_ptr",
        "frames length width blocks chunk",
        constants,
    )  # fmt: skip


def _group_cases(width: int, last: bool) -> list[AotCase]:
    tile = config.group(width, last)
    group: dict[str, object] = {"GROUP": width // 32}
    silu = group | {"SILU": True, "STAGES": config.stages(tile, 2, 2)}
    return [
        case(
            f"group_sums_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr", "mean_ptr rstd_ptr partial_ptr",
            "frames length width blocks chunk",
            silu | dict.fromkeys(("c1_ptr", "c2_ptr", "dx_ptr")), narrow_store_ok=True,
        ),
        case(
            f"group_means_c{width}", _group_means_kernel, tile, last, "weight_ptr",
            "partial_ptr c1_ptr c2_ptr", "length width blocks",
            group | {"BLOCK": config.MERGE}, small=True,
        ),
        case(
            f"group_bwd_c{width}", _group_bwd_kernel, tile, last,
            "dy_ptr x_ptr weight_ptr bias_ptr dx_ptr", "mean_ptr rstd_ptr c1_ptr c2_ptr",
            "frames length width blocks chunk", silu | {"partial_ptr": None},
        ),
    ]  # fmt: skip
