"""bias_gelu: a Linear's bias and GELU in one pass, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from .._modulation import as_tokens, check_tokens, check_vector
from .reference import bias_gelu_reference

OP = "bias_gelu"


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)``, the middle of a DiT's MLP: ``bias_gelu(F.linear(h, weight), bias)``.

    The tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415) that DiT, SD3, Flux and Wan
    use. ``F.linear`` with a bias first copies it into every row of its result; here it is added in
    registers. Arithmetic is fp32 with one rounding at the end. Any width, any strides with
    ``x.stride(-1) == 1``. The backward is deterministic, sums the bias's gradient in the same pass
    and keeps ``x`` alone.

    Args:
        x: ``[N, D]`` or ``[B, ..., D]``; fp32, bf16 or fp16 (fp64 runs the reference).
        bias: ``[D]``, any float dtype, or None.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    check_tokens(x)
    check_vector(bias, "bias", x.shape[-1], x.device)
    chosen = _backend.choose(OP, x) if x.numel() else "reference"
    if chosen == "reference":
        return bias_gelu_reference(x, bias)
    tokens = as_tokens(x)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _BiasGelu.apply(tokens, bias, chosen).view(x.shape)
    return _backend.implementation(OP, "fwd", chosen, x)(tokens, bias).view(x.shape)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, chosen: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.chosen = chosen
        return _backend.implementation(OP, "fwd", chosen, x)(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        need_dbias = ctx.needs_input_grad[1]
        run = _backend.implementation(OP, "bwd", ctx.chosen, x)
        dx, dbias = run(as_tokens(dy), x, bias, need_dbias)
        return dx, dbias.to(bias.dtype) if need_dbias else None, None


# --- raw ops ------------------------------------------------------------------------------------


def _fake_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(x.shape[-1] if need_dbias else 0, dtype=torch.float32)
    return x.new_empty(x.shape), dbias


_backend.register(
    OP,
    "(Tensor x, Tensor? bias) -> Tensor",
    "(Tensor dy, Tensor x, Tensor? bias, bool need_dbias) -> (Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
)
