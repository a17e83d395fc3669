"""Norm and 3-D rotary embedding of queries and keys in one pass, forward and backward."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import backend, laws
from .reference import qk_norm_rope_reference

if TYPE_CHECKING:
    from ...packing import Rope

__all__ = ["qk_norm_rope"]

_OP = "qk_norm_rope"
MAX_AXES = 4
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Norm(IntEnum):
    NONE = 0
    RMS = 1
    LAYER = 2
    RMS_FULL = 3


class Pairing(IntEnum):
    INTERLEAVED = 0
    HALF = 1
    HALF_PER_AXIS = 2


class Need(IntFlag):
    """Which gradients a backward call computes."""

    Q = 1
    K = 2
    Q_WEIGHT = 4
    K_WEIGHT = 8
    Q_BIAS = 16
    K_BIAS = 32


_NORMS = {None: Norm.NONE, "rms": Norm.RMS, "layer": Norm.LAYER, "rms_full": Norm.RMS_FULL}
_PAIRINGS = {p.name.lower(): p for p in Pairing}


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: Rope | None = None,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    law: laws.Law = "fp32_once",
) -> tuple[Tensor, Tensor]:
    """Normalises each head of q and k, then rotates it by its token's position.

    The norm is RMSNorm or LayerNorm over the D components of a head, or RMSNorm over all heads of
    a token (``rms_full``: Wan, LTX). The rotation turns the pair (a, b) by the angle of its token::

        a' = a cos - b sin        b' = b cos + a sin

    with angles read from the per-axis table of ``rope`` (RoFormer, arXiv:2104.09864, one axis per
    slice of the head). ``reference.py`` holds the definition in plain PyTorch. Text tokens sit at
    position 0 of every axis and are not turned. q and k may be views of one packed QKV projection
    (``qkv.unbind(1)`` of ``[N, 3, H, D]``); nothing is copied.

    Args:
        q: ``[N, Hq, D]`` packed or ``[B, L, Hq, D]`` dense; fp32, bf16, fp16 (fp64: reference).
            Any strides with ``stride(-1) == 1``. D is even.
        k: the same with Hk heads; its own number of tokens is allowed if ``rope`` is None.
        q_weight: scale of the norm, ``[D]``, or ``[Hq * D]`` for ``rms_full``; any float dtype.
        k_weight: the same for k.
        rope: tables and positions, of N (dense: L, or B * L) tokens. The first r components of a
            head are rotated, r = ``sum(rope.axes)``, the rest pass through. ``cos`` and ``sin``
            are ``[P, r/2]``, or ``[P, H, r/2]`` for angles that differ per head (Mochi, LTX).
            None: norm only.
        q_bias: bias of the LayerNorm, ``[D]``; only with ``norm="layer"``.
        k_bias: the same for k.
        norm: ``"rms"``, ``"layer"``, ``"rms_full"`` or None.
        eps: added to the mean square (variance).
        pairing: which components form a pair: ``"interleaved"`` (2j, 2j+1), ``"half"`` (j, j+r/2),
            ``"half_per_axis"`` (halves of each axis' own slice).
        law: rounding law; the points xhat, affine, pre_rope and rope apply (``sora_kernels.laws``).

    Returns:
        q', k': contiguous, in the shapes and dtype of q and k.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    norm_code = _lookup("norm", norm, _NORMS)
    pairing_code = _lookup("pairing", pairing, _PAIRINGS)
    mask = laws.resolve(law)
    _check_qk(q, k, rope is not None)
    _check_params(q, k, norm, q_weight, k_weight, q_bias, k_bias)
    cos = sin = position_index = None
    axes: tuple[int, ...] = ()
    if rope is not None:
        cos, sin, position_index, axes = rope.cos, rope.sin, rope.position_index, rope.axes
        _check_rope(q, k, cos, sin, position_index, axes)

    chosen = backend.choose(_OP, q)
    if chosen == "reference":
        return qk_norm_rope_reference(
            q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, position_index, tuple(axes),
            norm=norm, eps=eps, pairing=pairing, points=_point_names(mask),
        )  # fmt: skip
    tensors: tuple[Tensor | None, ...] = (q, k, q_weight, k_weight, q_bias, k_bias)
    rest = (cos, sin, position_index, list(axes), norm_code, eps, pairing_code, mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        yq, yk = _QkNormRope.apply(chosen, *tensors, *rest)
        return yq, yk
    yq, yk = _forward(chosen)(*tensors, *rest)
    return yq, yk


# --- checks -------------------------------------------------------------------------------------


def _lookup(name: str, value: Any, table: dict[Any, Any]) -> int:
    try:
        return int(table[value])
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {list(table)}, got {value!r}") from None


def _check_qk(q: Tensor, k: Tensor, rotated: bool) -> None:
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {x.dtype}")
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected [N, H, D] or [B, L, H, D], got {tuple(x.shape)}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: expected stride 1 in the last dimension, got {x.stride()}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: expected the device of q, {q.device}, got {k.device}")
    if k.ndim != q.ndim or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k: expected the rank and head width of q, {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if rotated and k.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"k: expected the tokens of q, {tuple(q.shape[:-2])}, got {tuple(k.shape[:-2])}"
        )
    if q.shape[-1] == 0 or q.shape[-1] % 2:
        raise ValueError(f"q: expected an even head width, got {q.shape[-1]}")


def _check_params(
    q: Tensor,
    k: Tensor,
    norm: str | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
) -> None:
    for name, x, t in (
        ("q_weight", q, q_weight),
        ("k_weight", k, k_weight),
        ("q_bias", q, q_bias),
        ("k_bias", k, k_bias),
    ):
        if t is None:
            continue
        if norm is None or (name.endswith("bias") and norm != "layer"):
            raise ValueError(f"{name}: expected None with norm={norm!r}, got a tensor")
        if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a float tensor, got {getattr(t, 'dtype', type(t))}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}")
        width = x.shape[-1] * (x.shape[-2] if norm == "rms_full" else 1)
        if t.ndim != 1 or t.shape[0] != width:
            raise ValueError(f"{name}: expected shape [{width}], got {tuple(t.shape)}")


def _check_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, index: Tensor, axes: tuple[int, ...]
) -> None:
    width = sum(axes)
    if not 1 <= len(axes) <= MAX_AXES or any(a < 0 or a % 2 for a in axes) or width == 0:
        raise ValueError(f"rope.axes: expected 1 to {MAX_AXES} even sizes, got {tuple(axes)}")
    if width > q.shape[-1]:
        raise ValueError(f"rope.axes: expected a sum of at most {q.shape[-1]}, got {tuple(axes)}")
    for name, table in (("rope.cos", cos), ("rope.sin", sin)):
        if table.dtype != torch.float32 and q.dtype != torch.float64:
            raise TypeError(f"{name}: expected float32, got {table.dtype}")
        if table.ndim not in (2, 3) or table.shape[-1] != width // 2 or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected [P, {width // 2}] or [P, H, {width // 2}], "
                f"got {tuple(table.shape)}"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {table.stride()}")
        if table.ndim == 3 and not table.shape[1] == q.shape[-2] == k.shape[-2]:
            raise ValueError(
                f"{name}: expected one table for each of the {q.shape[-2]} heads of q and "
                f"{k.shape[-2]} of k, got {table.shape[1]}"
            )
    if index.dtype != torch.int32 or not index.is_contiguous():
        raise TypeError(f"rope.position_index: expected contiguous int32, got {index.dtype}")
    if index.ndim != 2 or index.shape[1] not in (1, len(axes)):
        raise ValueError(
            f"rope.position_index: expected [N, 1] or [N, {len(axes)}], got {tuple(index.shape)}"
        )
    tokens = q.shape[0] if q.ndim == 3 else q.shape[0] * q.shape[1]
    if index.shape[0] != tokens and not (q.ndim == 4 and index.shape[0] == q.shape[1]):
        raise ValueError(f"rope: expected {tokens} tokens, got {index.shape[0]}")
    for name, t in (("cos", cos), ("sin", sin), ("position_index", index)):
        if t.device != q.device:
            raise ValueError(f"rope.{name}: expected the device of q, {q.device}, got {t.device}")


def _point_names(mask: int) -> frozenset[str]:
    return frozenset(p.name.lower() for p in laws.Point if p.name and p & mask)


# --- autograd -----------------------------------------------------------------------------------


def _forward(chosen: str) -> Any:
    if chosen == "triton" and backend.interpreting():
        from . import kernels

        return kernels.forward
    return torch.ops.sora_kernels.qk_norm_rope_fwd


def _backward(chosen: str) -> Any:
    if chosen == "triton" and backend.interpreting():
        from . import kernels

        return kernels.backward
    return torch.ops.sora_kernels.qk_norm_rope_bwd


class _QkNormRope(torch.autograd.Function):
    """Saves its inputs only: the statistics are recomputed from the row that is read anyway."""

    @staticmethod
    def forward(ctx: Any, chosen: str, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        q_weight, k_weight, q_bias, k_bias, cos, sin, position_index, *statics = args
        ctx.chosen = chosen
        ctx.statics = statics
        ctx.dtypes = [None if t is None else t.dtype for t in args[:4]]
        ctx.set_materialize_grads(False)
        norm = statics[1]
        # A rotation alone needs no input to go back; shapes and dtypes come from the gradients.
        saved = (None, None) if norm == Norm.NONE else (q, k)
        ctx.save_for_backward(*saved, q_weight, k_weight, cos, sin, position_index)
        return _forward(chosen)(q, k, *args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, k, q_weight, k_weight, cos, sin, position_index = ctx.saved_tensors
        dyq, dyk = grads
        needs = 0
        for bit, wanted in enumerate(ctx.needs_input_grad[1:7]):
            if wanted and (dyq, dyk)[bit % 2] is not None:
                needs |= 1 << bit
        out: list[Tensor | None] = [None] * 6
        if needs:
            # The side without a gradient is not touched; its stand-in only fills the argument.
            dyq = dyk if dyq is None else dyq
            dyk = dyq if dyk is None else dyk
            assert dyq is not None and dyk is not None
            dyq, dyk = _dense(dyq), _dense(dyk)
            computed = _backward(ctx.chosen)(
                dyq, dyk, q if q is not None else dyq, k if k is not None else dyk,
                q_weight, k_weight, cos, sin, position_index, *ctx.statics, needs,
            )  # fmt: skip
            out = [g if needs >> bit & 1 else None for bit, g in enumerate(computed)]
            for i, dtype in enumerate(ctx.dtypes):
                grad = out[2 + i]
                if grad is not None and grad.dtype != dtype:
                    out[2 + i] = grad.to(dtype)
        return None, *out, *([None] * (3 + len(ctx.statics)))


def _distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Views for repetitions: torch.compile refuses one tensor for two inputs of a Function."""
    result = list(tensors)
    for i in (1, 3, 5):
        t = tensors[i]
        if t is not None and t is tensors[i - 1]:
            result[i] = t.view_as(t)
    return tuple(result)


def _dense(grad: Tensor) -> Tensor:
    """Kernels take any outer strides, but rows of stride 1 (a sum's gradient has stride 0)."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


# --- registration -------------------------------------------------------------------------------

_COMMON = (
    "Tensor? cos, Tensor? sin, Tensor? position_index, int[] axes, "
    "int norm, float eps, int pairing, int law"
)
backend.define(
    f"{_OP}_fwd(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
    f"Tensor? k_bias, {_COMMON}) -> (Tensor, Tensor)"
)
backend.define(
    f"{_OP}_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
    f"{_COMMON}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_fwd(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_bwd(
    dyq: Tensor,
    dyk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position_index: Tensor | None,
    axes: list[int],
    norm: int,
    eps: float,
    pairing: int,
    law: int,
    needs: int,
) -> tuple[Tensor, ...]:
    return new_gradients(q, k, norm, needs)


def new_gradients(q: Tensor, k: Tensor, norm: int, needs: int) -> tuple[Tensor, ...]:
    """Uninitialised results of a backward; those that are not needed have no elements.

    Gradients of weights and biases are fp32 here; autograd gets them in the parameter's dtype.
    """
    out = [x.new_empty(x.shape if needs & bit else (0,)) for bit, x in ((1, q), (2, k))]
    for first in (Need.Q_WEIGHT, Need.Q_BIAS):
        for side, x in enumerate((q, k)):
            width = x.shape[-1] * (x.shape[-2] if norm == Norm.RMS_FULL else 1)
            wanted = needs & (int(first) << side)
            out.append(x.new_empty((width,) if wanted else (0,), dtype=torch.float32))
    return tuple(out)


def _cuda_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    from . import kernels

    return kernels.forward(*args)


def _cuda_bwd(*args: Any) -> tuple[Tensor, ...]:
    from . import kernels

    return kernels.backward(*args)


backend.fake(f"{_OP}_fwd", _fake_fwd)
backend.fake(f"{_OP}_bwd", _fake_bwd)
if backend.HAS_TRITON:
    backend.implement(f"{_OP}_fwd", "CUDA", _cuda_fwd)
    backend.implement(f"{_OP}_bwd", "CUDA", _cuda_bwd)
backend.guard_autograd(f"{_OP}_fwd")
backend.guard_autograd(f"{_OP}_bwd")
