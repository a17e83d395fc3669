"""causal_conv_pad: the input of a causal 3-D convolution, and its next cache, in one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from .._modulation import FLOATS
from .reference import causal_conv_pad_reference

__all__ = ["causal_conv_pad"]

OP = "causal_conv_pad"
_FORMATS = (torch.contiguous_format, torch.channels_last_3d)
_MODES = ("replicate", "zeros")


def causal_conv_pad(
    x: Tensor,
    cache: Tensor | None = None,
    *,
    pad_t: int,
    pad_h: int | tuple[int, int] = 0,
    pad_w: int | tuple[int, int] = 0,
    mode_t: str = "replicate",
    cache_len: int | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` with ``pad_t`` frames before it, zeros around every frame, and the cache to carry on.

    The input of a causal 3-D convolution (CausalConv3d of Wan and of CogVideoX) as
    ``F.pad(torch.cat([fill, cache, x], 2), (*pad_w, *pad_h))``: the frames that came before, and
    where there are fewer than ``pad_t`` of them, in front, the fill: the first frame there is,
    repeated, or zeros. Values are copied bit for bit. A video fed in chunks, each with the cache
    that the one before returned, gives the convolution the same windows as the whole video.

    Args:
        x: ``[B, C, T, H, W]``, T >= 1, any strides; fp32, bf16 or fp16 (fp64 runs the reference).
        cache: ``[B, C, K, H, W]`` with K <= ``pad_t`` frames before ``x``, any strides, or None.
        pad_t: frames in front, the time kernel's size minus one.
        pad_h, pad_w: rows and columns of zeros on both sides, or (before, after).
        mode_t: the fill, ``"replicate"`` or ``"zeros"``.
        cache_len: frames of the returned cache, ``pad_t`` by default; 0 if it is not needed.
        memory_format: of both results, ``torch.contiguous_format`` or ``torch.channels_last_3d``;
            by default that of ``x``.

    Returns:
        ``(padded, new_cache)``: ``[B, C, pad_t + T, H + pads, W + pads]`` and the last
        ``cache_len`` frames of it without the zeros around, in memory of its own. Gradients flow
        to ``x`` and ``cache`` from both; a repeated frame's are summed in fp32, in fixed order.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    _check(x, cache, pad_t)
    if mode_t not in _MODES:
        raise ValueError(f"mode_t: expected one of {_MODES}, got {mode_t!r}")
    keep = pad_t if cache_len is None else cache_len
    if not 0 <= keep <= pad_t + x.shape[2]:
        raise ValueError(
            f"cache_len: expected 0 to {pad_t + x.shape[2]} (pad_t + T) frames, got {keep}"
        )
    if memory_format is None:
        memory_format = _FORMATS[int(_is_channels_last(x))]
    elif memory_format not in _FORMATS:
        raise ValueError(f"memory_format: expected one of {_FORMATS}, got {memory_format}")
    top, bottom = _pair(pad_h, "pad_h")
    left, right = _pair(pad_w, "pad_w")
    cached = None if cache is None or cache.shape[2] == 0 else cache

    chosen = "reference" if x.numel() == 0 else _backend.choose(OP, x)
    if chosen == "reference":
        return causal_conv_pad_reference(
            x, cached, pad_t, (top, bottom), (left, right), mode_t == "replicate", keep,
            memory_format,
        )  # fmt: skip
    pads = (pad_t, top, bottom, left, right)
    options = (pads, mode_t == "replicate", keep, memory_format == torch.channels_last_3d)
    if torch.is_grad_enabled() and (
        x.requires_grad or (cached is not None and cached.requires_grad)
    ):
        padded, kept = _CausalConvPad.apply(x, cached, chosen, options)
        return padded, kept
    return _forward(chosen, x, cached, options)


def _check(x: Tensor, cache: Tensor | None, pad_t: int) -> None:
    for name, tensor in (("x", x), ("cache", cache)):
        if tensor is None and name == "cache":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.dim() != 5:
            raise ValueError(f"{name}: expected shape [B, C, T, H, W], got {tuple(tensor.shape)}")
    if pad_t < 0:
        raise ValueError(f"pad_t: expected at least 0 frames, got {pad_t}")
    batch, channels, frames, height, width = x.shape
    if frames < 1:
        raise ValueError(f"x: expected at least one frame, got {tuple(x.shape)}")
    if cache is None:
        return
    if cache.dtype != x.dtype:
        raise TypeError(f"cache: expected dtype {x.dtype} (that of x), got {cache.dtype}")
    if cache.device != x.device:
        raise ValueError(f"cache: expected device {x.device} (that of x), got {cache.device}")
    if (*cache.shape[:2], *cache.shape[3:]) != (batch, channels, height, width):
        raise ValueError(
            f"cache: expected shape [{batch}, {channels}, K, {height}, {width}], "
            f"got {tuple(cache.shape)}"
        )
    if cache.shape[2] > pad_t:
        raise ValueError(f"cache: expected at most pad_t = {pad_t} frames, got {cache.shape[2]}")


def _pair(pad: int | tuple[int, int], name: str) -> tuple[int, int]:
    before, after = pad if isinstance(pad, tuple) else (pad, pad)
    if before < 0 or after < 0:
        raise ValueError(f"{name}: expected zeros or more, got {pad}")
    return before, after


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


# --- autograd -----------------------------------------------------------------------------------

# The raw ops see [B, A, T, H, W, I]: A = C and I = 1 where channels come first, A = 1 and I = C
# where they come last. Their results are contiguous in that order.


def _to_raw(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).unsqueeze(1) if channels_last else x.unsqueeze(-1)


def _from_raw(x: Tensor, channels_last: bool) -> Tensor:
    return x.squeeze(1).permute(0, 4, 1, 2, 3) if channels_last else x.squeeze(-1)


def _forward(
    chosen: str, x: Tensor, cache: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    pads, replicate, keep, channels_last = options
    run = _backend.implementation(OP, "fwd", chosen, x)
    padded, kept = run(
        _to_raw(x, channels_last),
        None if cache is None else _to_raw(cache, channels_last),
        *pads,
        replicate,
        keep,
    )
    return _from_raw(padded, channels_last), _from_raw(kept, channels_last)


class _CausalConvPad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cache: Tensor | None, chosen: str, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.chosen, ctx.options = chosen, options
        ctx.cache_frames = 0 if cache is None else cache.shape[2]
        return _forward(chosen, x, cache, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpadded: Tensor, dkept: Tensor) -> tuple[Tensor | None, ...]:
        pads, replicate, _, _ = ctx.options
        channels_last = _is_channels_last(dpadded)  # the layout that the convolution's gradient has
        needs_x, needs_cache = ctx.needs_input_grad[:2]
        run = _backend.implementation(OP, "bwd", ctx.chosen, dpadded)
        dx, dcache = run(
            _to_raw(dpadded, channels_last),
            _to_raw(dkept, channels_last),
            ctx.cache_frames,
            *pads,
            replicate,
            int(needs_x) + 2 * int(needs_cache),
        )
        return (
            _from_raw(dx, channels_last) if needs_x else None,
            _from_raw(dcache, channels_last) if needs_cache else None,
            None,
            None,
        )


# --- raw ops ------------------------------------------------------------------------------------


def _fake_fwd(
    x: Tensor, cache: Tensor | None, pad_t: int, top: int, bottom: int, left: int, right: int,
    replicate: bool, keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, outer, frames, height, width, inner = x.shape
    shape = (batch, outer, pad_t + frames, top + height + bottom, left + width + right, inner)
    return x.new_empty(shape), x.new_empty((batch, outer, keep, height, width, inner))


def _fake_bwd(
    dpadded: Tensor, dkept: Tensor, cache_frames: int, pad_t: int, top: int, bottom: int,
    left: int, right: int, replicate: bool, needs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, outer, frames, height, width, inner = dpadded.shape
    rest = (height - top - bottom, width - left - right, inner)

    def grad(bit: int, count: int) -> Tensor:
        return dpadded.new_empty((batch, outer, count, *rest) if needs & bit else (0,))

    return grad(1, frames - pad_t), grad(2, cache_frames)


_PADS = "SymInt pad_t, SymInt top, SymInt bottom, SymInt left, SymInt right, bool replicate"

_backend.register(
    OP,
    f"(Tensor x, Tensor? cache, {_PADS}, SymInt keep) -> (Tensor, Tensor)",
    f"(Tensor dpadded, Tensor dkept, SymInt cache_frames, {_PADS}, int needs) -> (Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
)
