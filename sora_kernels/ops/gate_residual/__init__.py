"""gate_residual: a gated branch added to the residual stream, one pass, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from ...laws import Law, resolve
from ...rows import RowMap
from .._modulation import as_tokens, check_branch, check_tokens, check_vector, modulation_rows
from .config import MAX_WIDTH
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
    width = x.shape[-1]
    if norm not in NORMS:
        raise ValueError(f'norm: expected None, "rms" or "layer", got {norm!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    check_vector(weight, "weight", width, x.device)
    if weight is not None and norm is None:
        raise ValueError("weight: expected None without norm=")
    check_vector(gate_table, "gate_table", width, x.device)
    if gate is None and (gate_table is not None or tanh):
        name = "gate_table" if gate_table is not None else "tanh"
        raise ValueError(f"{name}: expected gate beside it")
    row_map, mods = modulation_rows(x, rows, per, {"gate": gate})
    options = (row_map, bool(tanh), norm, float(eps), resolve(law))
    tensors = (mods["gate"], gate_table, weight)
    chosen = _choose(x, norm)
    if chosen == "reference":
        return _reference(x, y, tensors, options).view(x.shape)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, *tensors)):
        gated = any(t is not None and t.requires_grad for t in tensors[:2])
        reads_y = gated or norm is not None  # else the backward is gate * dout alone
        out = _GateResidual.apply(as_tokens(x), as_tokens(y), chosen, options, reads_y, *tensors)
    else:
        out, _, _ = _forward(chosen, as_tokens(x), as_tokens(y), tensors, options)
    return out.view(x.shape)


def _choose(x: Tensor, norm: str | None) -> str:
    chosen = _backend.choose(OP, x)
    if x.numel() == 0:
        return "reference"
    if chosen == "triton" and norm is not None and x.shape[-1] > MAX_WIDTH:
        return _backend.fall_back(OP, x, f"a row of {x.shape[-1]} > {MAX_WIDTH} does not fit")
    return chosen


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
    if chosen == "triton" and not x.is_cuda:  # the interpreter
        from . import kernels

        run: Any = kernels.forward
    else:
        run = torch.ops.sora_kernels.gate_residual_fwd
    return run(x, y, *tensors, rows.index, rows.tokens_per_row, tanh, NORMS[norm], eps, law)


def _backward(chosen: str, dout: Tensor) -> Any:
    if chosen == "triton" and not dout.is_cuda:  # the interpreter
        from . import kernels

        return kernels.backward
    return torch.ops.sora_kernels.gate_residual_bwd


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
    dy, dgate, _ = _backward(chosen, dout)(
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
            run = _backward(ctx.chosen, dout)
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
            dgate.to(gate.dtype) if needs_gate else None,
            dgate.sum(0).to(gate_table.dtype) if needs_table else None,
            dweight.to(weight.dtype) if needs_weight else None,
        )


# --- raw ops ------------------------------------------------------------------------------------

_backend.define(
    "gate_residual_fwd(Tensor x, Tensor y, Tensor? gate, Tensor? gate_table, Tensor? weight, "
    "Tensor? index, SymInt tokens_per_row, bool tanh, int norm, float eps, int law) "
    "-> (Tensor, Tensor, Tensor)"
)
_backend.define(
    "gate_residual_bwd(Tensor dout, Tensor? y, Tensor mean, Tensor rstd, Tensor? gate, "
    "Tensor? gate_table, Tensor? weight, Tensor? index, Tensor? order, Tensor? offsets, "
    "SymInt tokens_per_row, bool tanh, int norm, int law, ScalarType y_dtype, int needs) "
    "-> (Tensor, Tensor, Tensor)"
)


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


def _cuda_fwd(*args: Any) -> tuple[Tensor, ...]:
    from . import kernels

    return kernels.forward(*args)


def _cuda_bwd(*args: Any) -> tuple[Tensor, ...]:
    from . import kernels

    return kernels.backward(*args)


_backend.fake("gate_residual_fwd", _fake_fwd)
_backend.fake("gate_residual_bwd", _fake_bwd)
_backend.implement("gate_residual_fwd", "CUDA", _cuda_fwd)
_backend.implement("gate_residual_bwd", "CUDA", _cuda_bwd)
_backend.guard_autograd("gate_residual_fwd")
_backend.guard_autograd("gate_residual_bwd")
