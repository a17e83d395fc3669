"""Triton kernels of causal_conv_pad, forward and backward, and their launchers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...aot import AotCase
from .._launch import cdiv, launch
from .config import chip_of, choose_config


@triton.jit
def _row_offsets(e, inner, stride_w, stride_i, DENSE: tl.constexpr):
    """Offset of element e of a row of W x I; the division is left out where rows are dense.

    int64: where memory is channels first, the last channel of one long video lies beyond 2^31.
    """
    if DENSE:
        offsets = e
    else:
        offsets = (e // inner).to(tl.int64) * stride_w + (e % inner).to(tl.int64) * stride_i
    return offsets


# What follows from the numbers of frames and of a video's size: no new kernel for another value.
@triton.jit(
    do_not_specialize=["rows", "padded_frames", "padded_height", "height", "cache_frames", "fill",
                       "keep", "top"],
    do_not_specialize_on_alignment=["outer"],
)  # fmt: skip
def _causal_conv_pad_fwd_kernel(
    x_ptr,  # [B, A, T, H, W, I]
    cache_ptr,  # [B, A, K, H, W, I] or None
    padded_ptr,  # [B, A, fill + K + T, top + H + bottom, left + W + right, I]
    kept_ptr,  # [B, A, keep, H, W, I] or None
    rows,
    outer,
    padded_frames,
    padded_height,
    height,
    cache_frames,
    fill,
    keep,
    top,
    left,  # elements, like row and padded_row
    row,
    padded_row,
    inner,
    x_b, x_a, x_t, x_h, x_w, x_i,
    cache_b, cache_a, cache_t, cache_h, cache_w, cache_i,
    REPLICATE: tl.constexpr,
    X_DENSE: tl.constexpr,
    CACHE_DENSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """padded[j] = (cache ++ x)[j - fill], the fill in front, zeros around; kept = its last frames.

    A program takes BLOCK_ROWS rows (one h of one frame) of the result.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    e = tl.program_id(1) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)[None, :]
    h = r % padded_height - top
    j = r // padded_height % padded_frames
    plane = r // padded_height // padded_frames
    b = plane // outer
    a = plane % outer
    source = j - fill
    filled = source < 0
    source = tl.where(filled, 0, source)
    cached = source < cache_frames
    from_e = e - left
    inside = (r < rows) & (h >= 0) & (h < height) & (from_e >= 0) & (from_e < row)
    wanted = inside
    if not REPLICATE:
        wanted = inside & (filled == 0)
    x_offsets = b * x_b + a * x_a + (source - cache_frames) * x_t + h * x_h
    x_offsets = x_offsets + _row_offsets(from_e, inner, x_w, x_i, X_DENSE)
    value = tl.load(x_ptr + x_offsets, mask=wanted & (cached == 0), other=0.0)
    if cache_ptr is not None:
        offsets = b * cache_b + a * cache_a + source * cache_t + h * cache_h
        offsets = offsets + _row_offsets(from_e, inner, cache_w, cache_i, CACHE_DENSE)
        old = tl.load(cache_ptr + offsets, mask=wanted & cached, other=0.0)
        value = tl.where(cached, old, value)
    tl.store(padded_ptr + r * padded_row + e, value, mask=(r < rows) & (e < padded_row))
    if kept_ptr is not None:
        k = j - (padded_frames - keep)
        offsets = ((plane * keep + k) * height + h) * row + from_e
        tl.store(kept_ptr + offsets, value, mask=inside & (k >= 0))


@triton.jit(
    do_not_specialize=["rows", "count", "first", "height", "fill", "copies", "first_kept", "top"],
    do_not_specialize_on_alignment=["outer"],
)
def _causal_conv_pad_bwd_kernel(
    dpadded_ptr,  # as padded above, any strides
    dkept_ptr,
    grad_ptr,  # [B, A, count, H, W, I]
    rows,
    outer,
    count,
    first,
    height,
    fill,
    copies,  # fill if the first frame was repeated, else 0
    first_kept,  # the padded frame that kept begins with
    top,
    left,  # elements of dpadded, strides applied
    row,
    inner,
    p_b, p_a, p_t, p_h, p_w, p_i,
    k_b, k_a, k_t, k_h, k_w, k_i,
    P_DENSE: tl.constexpr,
    K_DENSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """grad = sum over the places a source frame was copied to; one term is copied exactly.

    ``grad`` holds the source frames (cache, then x) from ``first`` on.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    e = tl.program_id(1) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)[None, :]
    h = r % height
    source = first + r // height % count
    plane = r // height // count
    b = plane // outer
    a = plane % outer
    mask = (r < rows) & (e < row)
    last = fill + source
    p_offsets = b * p_b + a * p_a + (h + top) * p_h + left
    p_offsets = p_offsets + _row_offsets(e, inner, p_w, p_i, P_DENSE)
    k_offsets = b * k_b + a * k_a + h * k_h
    k_offsets = k_offsets + _row_offsets(e, inner, k_w, k_i, K_DENSE)
    total = tl.load(dpadded_ptr + p_offsets + last * p_t, mask=mask, other=0.0).to(tl.float32)
    kept = mask & (last >= first_kept)
    total += tl.load(
        dkept_ptr + k_offsets + (last - first_kept) * k_t, mask=kept, other=0.0
    ).to(tl.float32)  # fmt: skip
    # Only programs that hold rows of the first frame repeat.
    for j in range(tl.max(tl.where((source == 0) & (r < rows), copies, 0))):
        repeated = mask & (source == 0)
        total += tl.load(dpadded_ptr + p_offsets + j * p_t, mask=repeated, other=0.0).to(tl.float32)
        kept = repeated & (j >= first_kept)
        total += tl.load(
            dkept_ptr + k_offsets + (j - first_kept) * k_t, mask=kept, other=0.0
        ).to(tl.float32)  # fmt: skip
    tl.store(grad_ptr + r * row + e, total.to(grad_ptr.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    cache: Tensor | None,
    pad_t: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    replicate: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """The raw op causal_conv_pad_fwd: (padded, kept)."""
    batch, outer, frames, height, width, inner = x.shape
    shape = (batch, outer, pad_t + frames, top + height + bottom, left + width + right, inner)
    padded = x.new_empty(shape)
    kept = x.new_empty((batch, outer, keep, height, width, inner))
    cache_frames = 0 if cache is None else cache.shape[2]
    rows = batch * outer * shape[2] * shape[3]
    padded_row = shape[4] * inner
    block_rows, block_row, num_warps = choose_config(padded_row, chip_of(x))
    launch(
        _causal_conv_pad_fwd_kernel,
        (cdiv(rows, block_rows), cdiv(padded_row, block_row)),
        x.device,
        x,
        cache,
        padded,
        kept if keep else None,
        rows,
        outer,
        shape[2],
        shape[3],
        height,
        cache_frames,
        pad_t - cache_frames,
        keep,
        top,
        left * inner,
        width * inner,
        padded_row,
        inner,
        *x.stride(),
        *((0,) * 6 if cache is None else cache.stride()),
        REPLICATE=replicate,
        X_DENSE=_dense(x),
        CACHE_DENSE=cache is None or _dense(cache),
        BLOCK_ROWS=block_rows,
        BLOCK_ROW=block_row,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return padded, kept


def backward(
    dpadded: Tensor,
    dkept: Tensor,
    cache_frames: int,
    pad_t: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    replicate: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """The raw op causal_conv_pad_bwd: (dx, dcache), empty where ``needs`` lacks bit 0 or 1."""
    batch, outer, padded_frames, padded_height, padded_width, inner = dpadded.shape
    height = padded_height - top - bottom
    row = (padded_width - left - right) * inner
    fill = pad_t - cache_frames
    block_rows, block_row, num_warps = choose_config(row, chip_of(dpadded))

    def grad_of(bit: int, first: int, count: int) -> Tensor:
        if not needs & bit:
            return dpadded.new_empty(0)
        grad = dpadded.new_empty((batch, outer, count, height, row // max(inner, 1), inner))
        rows = batch * outer * count * height
        launch(
            _causal_conv_pad_bwd_kernel,
            (cdiv(rows, block_rows), cdiv(row, block_row)),
            dpadded.device,
            dpadded,
            dkept,
            grad,
            rows,
            outer,
            count,
            first,
            height,
            fill,
            fill if replicate else 0,
            padded_frames - dkept.shape[2],
            top,
            left * dpadded.stride(4),
            row,
            inner,
            *dpadded.stride(),
            *dkept.stride(),
            P_DENSE=_dense(dpadded),
            K_DENSE=_dense(dkept),
            BLOCK_ROWS=block_rows,
            BLOCK_ROW=block_row,
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
        return grad

    return grad_of(1, cache_frames, padded_frames - pad_t), grad_of(2, 0, cache_frames)


def _dense(x: Tensor) -> bool:
    """W and I are one contiguous stretch."""
    width, inner = x.shape[4:]
    return (inner == 1 or x.stride(5) == 1) and (width == 1 or x.stride(4) == inner)


def aot_cases() -> list[AotCase]:
    """Channels last, as Wan's VAE runs it: 3x3x3 convolutions of 96 and 384 channels, bf16."""
    return [case for width, inner in ((208, 96), (52, 384)) for case in _cases(width, inner)]


def _cases(width: int, inner: int) -> list[AotCase]:
    name = f"w{width}_c{inner}"
    forward_config = choose_config((width + 2) * inner)
    backward_config = choose_config(width * inner)
    x_strides = ("x_b", "x_a", "x_t", "x_h", "x_w")
    cache_strides = ("cache_b", "cache_a", "cache_t", "cache_h", "cache_w")
    forward_integers = (
        "rows", "outer", "padded_frames", "padded_height", "height", "cache_frames", "fill",
        "keep", "top", "left", "row", "padded_row", "inner", *x_strides, "x_i", *cache_strides,
        "cache_i",
    )  # fmt: skip
    forward_pointers = dict.fromkeys(("x_ptr", "cache_ptr", "padded_ptr", "kept_ptr"), "*bf16")
    p_strides = ("p_b", "p_a", "p_t", "p_h", "p_w")
    k_strides = ("k_b", "k_a", "k_t", "k_h", "k_w")
    backward_integers = (
        "rows", "outer", "count", "first", "height", "fill", "copies", "first_kept", "top",
        "left", "row", "inner", *p_strides, "p_i", *k_strides, "k_i",
    )  # fmt: skip
    backward_pointers = dict.fromkeys(("dpadded_ptr", "dkept_ptr", "grad_ptr"), "*bf16")
    return [
        AotCase(
            name=f"causal_conv_pad_fwd_{name}",
            kernel=_causal_conv_pad_fwd_kernel,
            signature={**forward_pointers, **dict.fromkeys(forward_integers, "i32")},
            constexprs={
                "REPLICATE": True,
                "X_DENSE": True,
                "CACHE_DENSE": True,
                "BLOCK_ROWS": forward_config.block_rows,
                "BLOCK_ROW": forward_config.block_row,
            },
            num_warps=forward_config.num_warps,
            divisible=(
                *forward_pointers, *x_strides, *cache_strides, "left", "row", "padded_row", "inner",
            ),
            enable_fp_fusion=False,
        ),
        AotCase(
            name=f"causal_conv_pad_bwd_{name}",
            kernel=_causal_conv_pad_bwd_kernel,
            signature={**backward_pointers, **dict.fromkeys(backward_integers, "i32")},
            constexprs={
                "P_DENSE": True,
                "K_DENSE": True,
                "BLOCK_ROWS": backward_config.block_rows,
                "BLOCK_ROW": backward_config.block_row,
            },
            num_warps=backward_config.num_warps,
            divisible=(*backward_pointers, *p_strides, *k_strides, "left", "row", "inner"),
            enable_fp_fusion=False,
        ),
    ]  # fmt: skip
