"""gate_residual_norm_modulate: the gated residual and the next layer's adaLN input in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from ...laws import Law, Point, resolve
from ...rows import RowMap
from .._modulation import (
    as_tokens,
    check_branch,
    check_tokens,
    check_vector,
    choose,
    grad_like,
    like_stream,
    modulation_rows,
    table_grad,
    wants_grad,
)
from ..gate_residual import branch_gradients
from .reference import gate_residual_norm_modulate_reference

OP = "gate_residual_norm_modulate"

# Bits of `needs`, in the order of the backward's results.
DX, DY, DY2, DGATE, DGATE2, DWEIGHT, DBIAS, DSHIFT, DSCALE = (1 << i for i in range(9))


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    y2: Tensor | None = None,
    gate2: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    rows: RowMap | None = None,
    per: str | None = None,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    law: Law = "fp32_once",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + gate*y`` and ``(1 + scale) * (norm(r) * weight + bias) + shift``, both returned.

    The end of one branch of a DiT block (arXiv 2212.09748) and the start of the next, without
    writing the residual stream and reading it back. Every modulation is optional: without a gate a
    plain residual add, without shift and scale a plain (affine) norm. Arithmetic is fp32, rounding
    follows ``law``; the norm reads the unrounded sum unless the law has ``residual``. Any width,
    any strides with ``stride(-1) == 1``; modulations may be chunks of a projection. The backward
    is one deterministic pass and computes only the gradients that are asked for.

    Args:
        x: the residual stream, ``[N, D]`` or ``[B, ..., D]``; fp32, bf16 or fp16 (fp64 runs the
            reference).
        y: the branch, shape of ``x``; dtype of ``x``, or bf16 or fp16 beside an fp32 ``x``.
        gate, shift, scale: the modulation, in the shape that ``rows`` or ``per`` names (one row
            map for all), or None. Any of the input dtypes or fp32.
        y2, gate2: a second gated branch, dtype of ``y`` (SD3.5's dual attention).
        weight, bias: ``[D]``, the affine part of the norm, or None.
        norm: ``"layer"`` (mean removed) or ``"rms"``.
        eps: added to the variance or mean square.
        rows: a :class:`RowMap`; modulations are then ``[R, D]``, token n uses row
            ``rows.index[n]``.
        per: without ``rows``: ``"sample"`` (default) ``[B, D]`` (``[1, D]`` for ``x`` ``[N, D]``),
            ``"frame"`` ``[B, F, D]`` with F dividing the tokens of a sample, ``"token"`` the shape
            of ``x``, ``"all"`` ``[D]``.
        gate_table, shift_table, scale_table: ``[D]``, added to every row of their modulation in
            registers (adaLN-single of PixArt, arXiv 2310.00426).
        law: rounding law, see :mod:`sora_kernels.laws`; the gated branch is rounded to the dtype
            of ``y``, the residual to that of ``x``, the rest to ``out_dtype``.
        out_dtype: of the normed result: the dtype of ``y`` (the default; it feeds the next branch)
            or that of ``x``.

    Returns:
        ``(residual, normed)``, both of the shape of ``x`` and contiguous, in the dtype of ``x`` and
        ``out_dtype``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    check_tokens(x)
    check_branch(y, "y", x)
    width = x.shape[-1]
    if y2 is not None:
        check_branch(y2, "y2", x)
        if y2.dtype != y.dtype:
            raise TypeError(f"y2: expected {y.dtype} (that of y), got {y2.dtype}")
    elif gate2 is not None:
        raise ValueError("gate2: expected y2 beside it")
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm: expected "layer" or "rms", got {norm!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    out_dtype = y.dtype if out_dtype is None else out_dtype
    if out_dtype not in (x.dtype, y.dtype):
        raise ValueError(f"out_dtype: expected {y.dtype} or {x.dtype}, got {out_dtype}")
    if weight is not None:
        check_vector(weight, "weight", width, x.device)
    if bias is not None:
        check_vector(bias, "bias", width, x.device)
    for name, table, of in (
        ("gate", gate_table, gate),
        ("shift", shift_table, shift),
        ("scale", scale_table, scale),
    ):
        if table is not None:
            check_vector(table, f"{name}_table", width, x.device)
            if of is None:
                raise ValueError(f"{name}_table: expected {name} beside it")
    named = {"gate": gate, "shift": shift, "scale": scale}
    if gate2 is not None:
        named["gate2"] = gate2
    row_map, mods = modulation_rows(x, rows, per, named)
    options = (row_map, norm == "rms", float(eps), resolve(law), out_dtype)
    tensors = (
        mods["gate"],
        mods.get("gate2"),
        weight,
        bias,
        mods["shift"],
        mods["scale"],
        gate_table,
        shift_table,
        scale_table,
    )
    chosen = choose(OP, x)
    if chosen == "reference":
        residual, normed = _reference(x, y, y2, tensors, options)
    else:
        streams = (as_tokens(x), as_tokens(y), None if y2 is None else as_tokens(y2))
        if wants_grad(x, y, y2, *tensors):
            keeps_x = _keeps_x(x, tensors, options[3])
            residual, normed = _GateResidualNormModulate.apply(
                *streams, chosen, options, keeps_x, *tensors
            )
        else:
            residual, normed, _, _ = _forward(chosen, *streams, tensors, options)
    return like_stream(residual, x), like_stream(normed, x)


def _keeps_x(x: Tensor, tensors: tuple[Tensor | None, ...], law: int) -> bool:
    """What the backward reads: x and the branches, of which it remakes the sum, or the residual.

    The gradient of a gate reads y anyway. Then x costs the same byte as the residual, is exact
    where a half-precision residual was rounded after the norm had read it, and is often kept
    alive by the norm before the branch. Without a gate's gradient the residual alone is less
    to keep and to read, and its rounding is harmless for dx (it enters through xhat times a mean);
    but sums over tokens in fp32 (scale, weight) would show it.
    """

    gate, gate2, weight, _, _, scale, gate_table, _, scale_table = tensors
    rounded = x.dtype is not torch.float32 and not law & Point.RESIDUAL
    return wants_grad(gate, gate2, gate_table) or (
        rounded and wants_grad(weight, scale, scale_table)
    )


def _reference(
    x: Tensor,
    y: Tensor,
    y2: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    rows, rms, eps, law, out_dtype = options
    return gate_residual_norm_modulate_reference(
        x, y, y2, *tensors, rows=rows, rms=rms, eps=eps, law=law, out_dtype=out_dtype
    )


def _forward(
    chosen: str,
    x: Tensor,
    y: Tensor,
    y2: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, rms, eps, law, out_dtype = options
    run = _backend.implementation(OP, "fwd", chosen, x)
    return run(x, y, y2, *tensors, rows.index, rows.tokens_per_row, eps, rms, law, out_dtype)


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        y2: Tensor | None,
        chosen: str,
        options: tuple[Any, ...],
        keeps_x: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        residual, normed, mean, rstd = _forward(chosen, x, y, y2, tensors, options)
        rows = options[0]
        stream = (x, y, y2) if keeps_x else (residual, None, None)
        ctx.save_for_backward(*stream, mean, rstd, *tensors, rows.index, rows.order, rows.offsets)
        ctx.set_materialize_grads(False)
        ctx.chosen, ctx.options = chosen, options
        ctx.y_dtype, ctx.two = y.dtype, y2 is not None
        return residual, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dresidual: Tensor | None, dnormed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, y2, mean, rstd, *rest = ctx.saved_tensors
        tensors, (index, order, offsets) = rest[:9], rest[9:]
        gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table = tensors
        rows, rms, _, law, _ = ctx.options
        needs_x, needs_y, needs_y2, _, _, _, *needs = ctx.needs_input_grad
        if dnormed is None:  # the norm was not used: this is a gate_residual
            return _GateResidualNormModulate.backward_of_residual(ctx, dresidual)
        # Without a gate the gradient of a branch is dx itself, where the dtype agrees.
        same = ctx.y_dtype == x.dtype
        as_dx = needs_y and gate is None and same
        as_dx2 = needs_y2 and gate2 is None and same
        wanted = (
            needs_x or as_dx or as_dx2,
            needs_y and not as_dx,
            needs_y2 and not as_dx2,
            needs[0] or needs[6],  # a table's gradient is the sum of its modulation's
            needs[1],
            needs[2],
            needs[3],
            needs[4] or needs[7],
            needs[5] or needs[8],
        )
        run = _backend.implementation(OP, "bwd", ctx.chosen, x)
        dx, dy, dy2, dgate, dgate2, dweight, dbias, dshift, dscale = run(
            None if dresidual is None else as_tokens(dresidual),
            as_tokens(dnormed),
            x,
            y,
            y2,
            mean,
            rstd,
            *tensors,
            index,
            order,
            offsets,
            rows.tokens_per_row,
            rms,
            law,
            ctx.y_dtype,
            sum(1 << bit for bit, want in enumerate(wanted) if want),
        )

        return (
            dx if needs_x else None,
            dx if as_dx else dy if needs_y else None,
            dx if as_dx2 else dy2 if needs_y2 else None,
            None,
            None,
            None,
            grad_like(dgate, gate, needs[0]),
            grad_like(dgate2, gate2, needs[1]),
            grad_like(dweight, weight, needs[2]),
            grad_like(dbias, bias, needs[3]),
            grad_like(dshift, shift, needs[4]),
            grad_like(dscale, scale, needs[5]),
            table_grad(dgate, gate_table, needs[6]),
            table_grad(dshift, shift_table, needs[7]),
            table_grad(dscale, scale_table, needs[8]),
        )

    @staticmethod
    def backward_of_residual(ctx: Any, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        _, y, y2, _, _, gate, gate2, *rest = ctx.saved_tensors
        gate_table = rest[4]
        rows, _, _, law, _ = ctx.options
        needs_x, needs_y, needs_y2, _, _, _, needs_gate, needs_gate2, *rest = ctx.needs_input_grad
        needs_table = rest[4]
        if dresidual is None:
            return (None,) * 15

        def branch(
            y: Tensor | None, gate: Tensor | None, table: Tensor | None, wants: int
        ) -> tuple[Tensor | None, Tensor | None]:
            if not wants:
                return None, None
            if gate is None:
                return dresidual.to(ctx.y_dtype), None
            dout = as_tokens(dresidual)
            return branch_gradients(ctx.chosen, dout, y, gate, table, rows, law, ctx.y_dtype, wants)

        dy, dgate = branch(y, gate, gate_table, needs_y + 2 * (needs_gate or needs_table))
        dy2, dgate2 = branch(y2, gate2, None, needs_y2 + 2 * needs_gate2)
        dtable = None
        if needs_table and dgate is not None:
            dtable = dgate.sum(0).to(gate_table.dtype)
        return (
            dresidual if needs_x else None,
            dy if needs_y else None,
            dy2 if needs_y2 else None,
            None,
            None,
            None,
            dgate.to(gate.dtype) if needs_gate and dgate is not None else None,
            dgate2.to(gate2.dtype) if needs_gate2 and dgate2 is not None else None,
            *(None,) * 4,
            dtable,
            None,
            None,
        )


# --- raw ops ------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor? gate, Tensor? gate2, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, "
    "Tensor? gate_table, Tensor? shift_table, Tensor? scale_table, Tensor? index, "
)


def _fake_fwd(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rms, out_dtype = args[14], args[16]
    tokens = x.shape[0] * x.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(0 if rms else tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


def _fake_bwd(
    dresidual: Tensor | None, dnormed: Tensor, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    gate, gate2, weight, bias, shift, scale, gate_table, shift_table, scale_table = args[4:13]
    y_dtype, needs = args[-2:]

    def grad(bit: int, of: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        if not needs & bit or of is None:
            return x.new_empty(0, dtype=torch.float32)
        return x.new_empty(of.shape, dtype=of.dtype if dtype is None else dtype)

    def with_table(bit: int, of: Tensor | None, table: Tensor | None) -> Tensor:
        return grad(bit, of, None if table is None else torch.float32)

    return (
        grad(DX, x, x.dtype),
        grad(DY, x, y_dtype),
        grad(DY2, x, y_dtype),
        with_table(DGATE, gate, gate_table),
        grad(DGATE2, gate2, None),
        grad(DWEIGHT, weight, torch.float32),
        grad(DBIAS, bias, torch.float32),
        with_table(DSHIFT, shift, shift_table),
        with_table(DSCALE, scale, scale_table),
    )


_backend.register(
    OP,
    f"(Tensor x, Tensor y, Tensor? y2, {_TENSORS} SymInt tokens_per_row, float eps, bool rms, "
    "int law, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor? dresidual, Tensor dnormed, Tensor x, Tensor? y, Tensor? y2, Tensor mean, "
    f"Tensor rstd, {_TENSORS} Tensor? order, Tensor? offsets, SymInt tokens_per_row, bool rms, "
    "int law, ScalarType y_dtype, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
    cuda=True,
)
