"""norm_silu: the norm of video VAEs and the SiLU behind it, one pass, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from .._modulation import FLOATS, check_vector
from .config import MAX_WIDTH
from .reference import norm_silu_reference

__all__ = ["norm_silu"]

OP = "norm_silu"
_EPS = {"rms": 1e-6, "l2": 1e-12, "group": 1e-6}


def norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    groups: int = 32,
    eps: float | None = None,
    silu: bool = True,
    per_frame: bool = False,
) -> Tensor:
    """``silu(xhat * weight + bias)`` with ``xhat`` the normalised ``x``, over the channels.

    Arithmetic is fp32 with one rounding at the end. The backward is deterministic, saves
    statistics alone beside ``x``, and computes only the gradients asked for.

    Args:
        x: ``[B, C, ...]`` with at least one further dimension, such as ``[B, C, T, H, W]``; fp32,
            bf16 or fp16 (fp64 runs the reference). Channels first (contiguous) or last
            (``torch.channels_last_3d``); views of these whose positions cannot be flattened
            (cut in H or W) are copied.
        weight, bias: ``[C]``, any float dtype, or None.
        norm: ``"rms"``: ``x / sqrt(mean(x^2) + eps)`` over the channels of every position.
            ``"l2"``: ``sqrt(C) * x / max(|x|, eps)``, the RMS_norm of Wan's VAE (which calls
            F.normalize). ``"group"``: GroupNorm (arXiv 1803.08494), over the channels of a group
            and all positions of a sample.
        groups: of ``"group"``; divides C.
        eps: by default 1e-6, for ``"l2"`` 1e-12.
        silu: False leaves the activation out.
        per_frame: ``"group"`` over every frame (dimension 2) by itself, so that no statistic
            mixes frames.

    Returns:
        A tensor of the shape, dtype and memory layout of ``x``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    _check(x, norm, groups, per_frame)
    channels = x.shape[1]
    check_vector(weight, "weight", channels, x.device)
    check_vector(bias, "bias", channels, x.device)
    eps = _EPS[norm] if eps is None else float(eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")

    chosen = "reference" if x.numel() == 0 else _backend.choose(OP, x)
    if chosen == "triton" and norm != "group" and channels > MAX_WIDTH:
        chosen = _backend.fall_back(OP, x, f"{channels} > {MAX_WIDTH} channels do not fit")
    if chosen == "reference":
        return norm_silu_reference(
            x, weight, bias, norm=norm, groups=groups, eps=eps, silu=silu, per_frame=per_frame
        )
    last = channels > 1 and x.stride(1) == 1 and not x.is_contiguous()
    floor = eps * channels**-0.5 if norm == "l2" else 0.0
    options = (
        groups if norm == "group" else 0,
        0.0 if norm == "l2" else eps,
        floor,
        silu,
        last,
        per_frame,
    )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        y: Tensor = _NormSilu.apply(x, weight, bias, chosen, options)
        return y
    return _forward(chosen, x, _to_raw(x, last, per_frame), weight, bias, options)[0]


def _check(x: Tensor, norm: str, groups: int, per_frame: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() < 3:
        raise ValueError(f"x: expected shape [B, C, ...] of 3 or more, got {tuple(x.shape)}")
    if norm not in _EPS:
        raise ValueError(f"norm: expected one of {tuple(_EPS)}, got {norm!r}")
    if norm == "group" and (groups < 1 or x.shape[1] % groups):
        raise ValueError(f"groups: expected a divisor of C = {x.shape[1]}, got {groups}")
    if per_frame and (norm != "group" or x.dim() < 4):
        raise ValueError(
            f'per_frame: expected False unless norm="group" and x is [B, C, T, ...], '
            f"got norm={norm!r} and x {tuple(x.shape)}"
        )


# The raw ops see [B, F, L, C] with unit stride along C (channels last) or L (channels first).
# Their results are contiguous as [B, F, L, C] or [B, C, F, L].


def _to_raw(x: Tensor, last: bool, per_frame: bool) -> Tensor:
    """A view whenever strides allow one."""
    if last:
        x = x.movedim(1, -1)
        x = x.flatten(2, -2) if per_frame else x.flatten(1, -2).unsqueeze(1)
        return x if x.stride(3) == 1 else x.contiguous()
    x = x.flatten(3) if per_frame else x.flatten(2).unsqueeze(2)
    return (x if x.stride(3) == 1 else x.contiguous()).permute(0, 2, 3, 1)


def _from_raw(y: Tensor, last: bool, shape: torch.Size) -> Tensor:
    if not last:
        return y.view(shape)
    return y.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _forward(
    chosen: str,
    x: Tensor,
    raw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    groups, eps, floor, silu, last, _ = options
    run = _backend.implementation(OP, "fwd", chosen, x)
    y, mean, rstd = run(raw, weight, bias, groups, eps, floor, silu, last)
    return _from_raw(y, last, x.shape), mean, rstd


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        chosen: str,
        options: tuple[Any, ...],
    ) -> Tensor:
        raw = _to_raw(x, *options[-2:])
        y, mean, rstd = _forward(chosen, x, raw, weight, bias, options)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.chosen, ctx.options = chosen, options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        groups, _, floor, silu, last, per_frame = ctx.options
        needs = ctx.needs_input_grad[:3]
        run = _backend.implementation(OP, "bwd", ctx.chosen, x)
        dx, dweight, dbias = run(
            _to_raw(dy, last, per_frame),
            _to_raw(x, last, per_frame),
            mean,
            rstd,
            weight,
            bias,
            groups,
            floor,
            silu,
            last,
            sum(1 << bit for bit, want in enumerate(needs) if want),
        )
        return (
            _from_raw(dx, last, x.shape) if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            None,
            None,
        )


# --- raw ops ------------------------------------------------------------------------------------


def new_like_raw(x: Tensor, last: bool) -> Tensor:
    """Contiguous memory for a result of the shape ``[B, F, L, C]`` of ``x``."""
    batch, frames, length, width = x.shape
    return x.new_empty((batch, frames, length, width) if last else (batch, width, frames, length))


def _fake_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, floor: float,
    silu: bool, last: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    regions = x.shape[0] * x.shape[1]
    return (
        new_like_raw(x, last),
        x.new_empty(regions * groups, dtype=torch.float32),
        x.new_empty(regions * (groups or x.shape[2]), dtype=torch.float32),
    )


def _fake_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    groups: int, floor: float, silu: bool, last: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def vector(bit: int) -> Tensor:
        return x.new_empty(x.shape[3] if needs & bit else 0, dtype=torch.float32)

    dx = new_like_raw(x, last) if needs & 1 else x.new_empty(0, dtype=torch.float32)
    return dx, vector(2), vector(4)


_backend.register(
    OP,
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, float floor, bool silu, "
    "bool channels_last) -> (Tensor, Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int groups, "
    "float floor, bool silu, bool channels_last, int needs) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
)
