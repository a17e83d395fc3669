"""norm_modulate: LayerNorm or RMSNorm, then adaLN modulation, one pass, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from ...laws import Law, resolve
from ...rows import RowMap
from .._modulation import (
    as_tokens,
    check_tokens,
    check_vector,
    choose,
    grad_like,
    is_own_gradient,
    like_stream,
    modulation_rows,
    output_dtype,
    table_grad,
    wants_grad,
)
from .reference import norm_modulate_reference

OP = "norm_modulate"


def norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    rows: RowMap | None = None,
    per: str | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
    law: Law = "fp32_once",
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(1 + scale) * (xhat * weight + bias) + shift`` with ``xhat`` the normalised ``x``.

    The adaLN of DiT (arXiv 2212.09748) and its kin. Statistics and arithmetic are fp32, rounding
    follows ``law``. Any width, any strides with ``x.stride(-1) == 1``; modulations may be chunks
    of a projection. The backward is deterministic and computes only the gradients asked for.

    Args:
        x: ``[N, D]`` or ``[B, ..., D]``; fp32, bf16 or fp16 (fp64 runs the reference).
        shift, scale: the modulation, dtype of ``x`` or fp32, in the shape that ``rows`` or ``per``
            names. Either may be None.
        weight, bias: ``[D]``, the affine part of the norm, or None.
        norm: ``"layer"`` (mean removed) or ``"rms"``.
        eps: added to the variance or mean square.
        rows: a :class:`RowMap`; modulations are then ``[R, D]``, token n uses row
            ``rows.index[n]``.
        per: without ``rows``: ``"sample"`` (default) ``[B, D]`` (``[1, D]`` for ``x`` ``[N, D]``),
            ``"frame"`` ``[B, F, D]`` with F dividing the tokens of a sample, ``"token"`` the shape
            of ``x``, ``"all"`` ``[D]``.
        shift_table, scale_table: ``[D]``, added to every row of shift and scale in registers
            (adaLN-single of PixArt, arXiv 2310.00426).
        shift2, scale2: a second modulation of the same norm (SD3.5's dual attention).
        law: rounding law, see :mod:`sora_kernels.laws`.
        out_dtype: of the result; fp32 ``x`` may give bf16 or fp16 (an fp32 residual stream).

    Returns:
        ``y`` of the shape of ``x``, contiguous; ``(y, y2)`` if ``shift2`` or ``scale2`` is given.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    check_tokens(x)
    width = x.shape[-1]
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm: expected "layer" or "rms", got {norm!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if weight is not None:
        check_vector(weight, "weight", width, x.device)
    if bias is not None:
        check_vector(bias, "bias", width, x.device)
    two = shift2 is not None or scale2 is not None
    for name, table, of in (("shift", shift_table, shift), ("scale", scale_table, scale)):
        if table is not None:
            check_vector(table, f"{name}_table", width, x.device)
            if of is None or two:
                raise ValueError(
                    f"{name}_table: expected {name} beside it and no second modulation"
                )
    named = {"shift": shift, "scale": scale}
    if two:
        named |= {"shift2": shift2, "scale2": scale2}
    row_map, mods = modulation_rows(x, rows, per, named)
    options = (
        row_map,
        norm == "rms",
        float(eps),
        resolve(law),
        output_dtype(x, out_dtype),
    )
    tensors = (
        weight,
        bias,
        mods["shift"],
        mods["scale"],
        shift_table,
        scale_table,
        mods.get("shift2"),
        mods.get("scale2"),
    )
    chosen = choose(OP, x)
    outputs: Any
    if chosen == "reference":
        outputs = _reference(x, tensors, options)
    elif wants_grad(x, *tensors):
        outputs = _NormModulate.apply(as_tokens(x), chosen, options, *tensors)
    else:
        outputs = _forward(chosen, as_tokens(x), tensors, options)
    y = like_stream(outputs[0], x)
    return (y, like_stream(outputs[1], x)) if two else y


def _reference(
    x: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Tensor, Tensor | None]:
    rows, rms, eps, law, out_dtype = options
    weight, bias, shift, scale, shift_table, scale_table, shift2, scale2 = tensors
    return norm_modulate_reference(
        x, shift, scale, weight, bias, shift_table, scale_table, shift2, scale2,
        rows=rows, rms=rms, eps=eps, law=law, out_dtype=out_dtype,
    )  # fmt: skip


def _forward(
    chosen: str, x: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, rms, eps, law, out_dtype = options
    run = _backend.implementation(OP, "fwd", chosen, x)
    return run(x, *tensors, rows.index, rows.tokens_per_row, eps, rms, law, out_dtype)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: str, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, y2, mean, rstd = _forward(chosen, x, tensors, options)
        rows = options[0]
        ctx.save_for_backward(x, mean, rstd, *tensors, rows.index, rows.order, rows.offsets)
        ctx.chosen, ctx.options = chosen, options
        return (y, y2) if y2.numel() else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dy2: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *rest = ctx.saved_tensors
        tensors, (index, order, offsets) = rest[:8], rest[8:]
        weight, bias, shift, scale, shift_table, scale_table, shift2, scale2 = tensors
        rows, rms, _, law, _ = ctx.options
        needs_x, _, _, *needs = ctx.needs_input_grad
        own = needs[2] and is_own_gradient(dy, shift, shift_table, rows)
        wanted = (
            needs_x,
            needs[0],
            needs[1],
            (needs[2] and not own) or needs[4],  # a table's gradient is the sum of its modulation's
            needs[3] or needs[5],
            needs[6],
            needs[7],
        )
        run = _backend.implementation(OP, "bwd", ctx.chosen, x)
        dx, dweight, dbias, dshift, dscale, dshift2, dscale2 = run(
            as_tokens(dy),
            None if dy2 is None else as_tokens(dy2),
            x,
            mean,
            rstd,
            *tensors,
            index,
            order,
            offsets,
            rows.tokens_per_row,
            rms,
            law,
            sum(1 << bit for bit, want in enumerate(wanted) if want),
        )

        return (
            dx if needs_x else None,
            None,
            None,
            grad_like(dweight, weight, needs[0]),
            grad_like(dbias, bias, needs[1]),
            dy.reshape(shift.shape) if own else grad_like(dshift, shift, needs[2]),
            grad_like(dscale, scale, needs[3]),
            table_grad(dshift, shift_table, needs[4]),
            table_grad(dscale, scale_table, needs[5]),
            grad_like(dshift2, shift2, needs[6]),
            grad_like(dscale2, scale2, needs[7]),
        )


# --- raw ops ------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? shift_table, "
    "Tensor? scale_table, Tensor? shift2, Tensor? scale2, Tensor? index, "
)


def _fake_fwd(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    shift2, scale2, rms, out_dtype = args[6], args[7], args[11], args[13]
    tokens = x.shape[0] * x.shape[1]
    two = shift2 is not None or scale2 is not None
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape if two else (0,), dtype=out_dtype),
        x.new_empty(0 if rms else tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


def _fake_bwd(dy: Tensor, dy2: Tensor | None, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, bias, shift, scale, shift_table, scale_table, shift2, scale2 = args[2:10]
    needs = args[-1]

    def grad(bit: int, of: Tensor | None, fp32: bool) -> Tensor:
        if not needs & 1 << bit or of is None:
            return x.new_empty(0, dtype=torch.float32)
        return x.new_empty(of.shape, dtype=torch.float32 if fp32 else of.dtype)

    return (
        x.new_empty(x.shape) if needs & 1 else x.new_empty(0, dtype=torch.float32),
        grad(1, weight, True),
        grad(2, bias, True),
        grad(3, shift, shift_table is not None),
        grad(4, scale, scale_table is not None),
        grad(5, shift2, False),
        grad(6, scale2, False),
    )


_backend.register(
    OP,
    f"(Tensor x, {_TENSORS} SymInt tokens_per_row, float eps, bool rms, int law, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    f"(Tensor dy, Tensor? dy2, Tensor x, Tensor mean, Tensor rstd, {_TENSORS} Tensor? order, "
    "Tensor? offsets, SymInt tokens_per_row, bool rms, int law, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
    cuda=True,
)
