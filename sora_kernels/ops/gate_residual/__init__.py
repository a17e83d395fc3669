"""gate_residual: a gated branch added to the residual stream, one pass, forward and backward."""

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
from .reference import gate_residual_reference

OP = "gate_residual"

NORMS = {None: 0, "rms": 1, "layer": 2}  # how the raw ops name a norm
DY, DGATE, DWEIGHT = 1, 2, 4  # bits of `needs`, in the order of the backward's results


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    rows: RowMap | None = None,
    per: str | None = None,
    gate_table: Tensor | None = None,
    tanh: bool = False,
    norm: str | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    law: Law = "fp32_once",
) -> Tensor:
    """``x + gate * y``, or the sandwich ``x + tanh(gate) * (norm(y) * weight)``.

    The gated residual of adaLN-Zero (DiT, arXiv 2212.09748); with ``tanh`` and ``norm="rms"`` that
    of Mochi (no weight) and Z-Image (weight); without a gate a plain residual add. Arithmetic is
    fp32, rounding follows ``law``. Any width, any strides with ``stride(-1) == 1``; the gate may
    be a chunk of a projection. The backward is deterministic and computes only the gradients that
    are asked for; the gradient of ``x`` is the upstream gradient itself, not a copy.

    Args:
        x: the residual stream, ``[N, D]`` or ``[B, ..., D]``; fp32, bf16 or fp16 (fp64 runs the
            reference).
        y: the branch, shape of ``x``; dtype of ``x``, or bf16 or fp16 beside an fp32 ``x``.
        gate: dtype of ``y`` or fp32, in the shape that ``rows`` or ``per`` names, or None.
        rows: a :class:`RowMap`; the gate is then ``[R, D]``, token n uses row ``rows.index[n]``.
        per: without ``rows``: ``"sample"`` (default) ``[B, D]`` (``[1, D]`` for ``x`` ``[N, D]``),
            ``"frame"`` ``[B, F, D]`` with F dividing the tokens of a sample, ``"token"`` the shape
            of ``x``, ``"all"`` ``[D]``.
        gate_table: ``[D]``, added to every row of the gate in registers (adaLN-single).
        tanh: the gate passes through tanh.
        norm: of the branch: None, ``"rms"`` or ``"layer"`` (mean removed).
        weight: ``[D]``, multiplies the normalised branch; needs ``norm``.
        eps: added to the variance or mean square.
        law: rounding law, see :mod:`sora_kernels.laws`; it rounds to the dtype of ``y``, the
            result to that of ``x``.

    Returns:
        The new residual stream, shape and dtype of ``x``, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, by name.
    """
    check_tokens(x)
    check_branch(y, "y", x)
    if norm not in NORMS:
        raise ValueError(f'norm: expected None, "rms" or "layer", got {norm!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if weight is not None:
        check_vector(weight, "weight", x.shape[-1], x.device)
        if norm is None:
            raise ValueError("weight: expected None without norm=")
    if gate_table is not None:
        check_vector(gate_table, "gate_table", x.shape[-1], x.device)
    if gate is None and (gate_table is not None or tanh):
        name = "gate_table" if gate_table is not None else "tanh"
        raise ValueError(f"{name}: expected gate beside it")
    row_map, mods = modulation_rows(x, rows, per, {"gate": gate})
    options = (row_map, bool(tanh), norm, float(eps), resolve(law))
    tensors = (mods["gate"], gate_table, weight)
    chosen = choose(OP, x, whole_rows=norm is not None)
    if chosen == "reference":
        return _reference(x, y, tensors, options)
    if wants_grad(x, y, *tensors):
        # else the backward is gate * dout alone
        reads_y = wants_grad(*tensors[:2]) or norm is not None
        out = _GateResidual.apply(as_tokens(x), as_tokens(y), chosen, options, reads_y, *tensors)
    else:
        out, _, _ = _forward(chosen, as_tokens(x), as_tokens(y), tensors, options)
    return like_stream(out, x)


def _reference(
    x: Tensor, y: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> Tensor:
    rows, tanh, norm, eps, law = options
    return gate_residual_reference(
        x, y, *tensors, rows=rows, tanh=tanh, norm=norm, eps=eps, law=law
    )


def _forward(
    chosen: str,
    x: Tensor,
    y: Tensor,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, tanh, norm, eps, law = options
    run = _backend.implementation(OP, "fwd", chosen, x)
    return run(x, y, *tensors, rows.index, rows.tokens_per_row, tanh, NORMS[norm], eps, law)


def branch_gradients(
    chosen: str,
    dout: Tensor,
    y: Tensor | None,
    gate: Tensor,
    gate_table: Tensor | None,
    rows: RowMap,
    law: int,
    y_dtype: torch.dtype,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """dy and dgate of ``gate * y`` for ``dout`` ``[B, L, D]``; for ops built on this one."""
    nothing = dout.new_empty(0, dtype=torch.float32)
    dy, dgate, _ = _backend.implementation(OP, "bwd", chosen, dout)(
        dout, y, nothing, nothing, gate, gate_table, None, rows.index, rows.order, rows.offsets,
        rows.tokens_per_row, False, 0, law, y_dtype, needs,
    )  # fmt: skip
    return dy, dgate


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        chosen: str,
        options: tuple[Any, ...],
        reads_y: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        out, mean, rstd = _forward(chosen, x, y, tensors, options)
        rows = options[0]
        ctx.save_for_backward(
            y if reads_y else None, mean, rstd, *tensors, rows.index, rows.order, rows.offsets
        )
        ctx.chosen, ctx.options, ctx.y_dtype = chosen, options, y.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, rstd, gate, gate_table, weight, index, order, offsets = ctx.saved_tensors
        rows, tanh, norm, _, law = ctx.options
        needs_x, needs_y, _, _, _, needs_gate, needs_table, needs_weight = ctx.needs_input_grad
        needs = DY * needs_y + DGATE * (needs_gate or needs_table) + DWEIGHT * needs_weight
        dx = dout if needs_x else None
        if gate is None and norm is None:
            return (dx, dout.to(ctx.y_dtype) if needs_y else None, *(None,) * 6)
        dy: Any
        dgate: Any
        dweight: Any
        dy = dgate = dweight = None
        if needs:
            run = _backend.implementation(OP, "bwd", ctx.chosen, dout)
            dy, dgate, dweight = run(
                as_tokens(dout), y, mean, rstd, gate, gate_table, weight, index, order, offsets,
                rows.tokens_per_row, tanh, NORMS[norm], law, ctx.y_dtype, needs,
            )  # fmt: skip
        return (
            dx,
            dy if needs_y else None,
            None,
            None,
            None,
            grad_like(dgate, gate, needs_gate),
            table_grad(dgate, gate_table, needs_table),
            grad_like(dweight, weight, needs_weight),
        )


# --- raw ops ------------------------------------------------------------------------------------


def _fake_fwd(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    norm = args[6]
    tokens = x.shape[0] * x.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens if norm == 2 else 0, dtype=torch.float32),
        x.new_empty(tokens if norm else 0, dtype=torch.float32),
    )


def _fake_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    gate, gate_table, weight = args[3:6]
    y_dtype, needs = args[-2:]

    def grad(bit: int, of: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not needs & bit or of is None:
            return dout.new_empty(0, dtype=torch.float32)
        return dout.new_empty(of.shape, dtype=dtype)

    return (
        grad(DY, dout, y_dtype),
        grad(DGATE, gate, torch.float32 if gate is None or gate_table is not None else gate.dtype),
        grad(DWEIGHT, weight, torch.float32),
    )


_backend.register(
    OP,
    "(Tensor x, Tensor y, Tensor? gate, Tensor? gate_table, Tensor? weight, Tensor? index, "
    "SymInt tokens_per_row, bool tanh, int norm, float eps, int law) -> (Tensor, Tensor, Tensor)",
    "(Tensor dout, Tensor? y, Tensor mean, Tensor rstd, Tensor? gate, Tensor? gate_table, "
    "Tensor? weight, Tensor? index, Tensor? order, Tensor? offsets, SymInt tokens_per_row, "
    "bool tanh, int norm, int law, ScalarType y_dtype, int needs) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
)
