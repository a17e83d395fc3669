"""The definition of gate_residual in plain PyTorch: the oracle. Shares no code with the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...laws import Point
from ...rows import RowMap
from .._rounding import round_if


def gate_residual_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    weight: Tensor | None,
    *,
    rows: RowMap,
    tanh: bool,
    norm: str | None,
    eps: float,
    law: int,
) -> Tensor:
    """``x + act(gate[row]) * (norm(y) * weight)`` for ``x``, ``y`` ``[..., D]``, in x's dtype.

    ``gate`` is ``[R, D]``, vectors ``[D]``; ``act`` is tanh or nothing, ``norm`` None, "rms" or
    "layer". Computes in fp32, or in fp64 if ``x`` is fp64; roundings are to the dtype of ``y``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = y.to(wide)

    if norm is not None:
        if norm == "layer":
            branch = branch - branch.mean(-1, keepdim=True)
        xhat = branch * torch.rsqrt(branch.square().mean(-1, keepdim=True) + eps)
        branch = round_if(law, Point.XHAT, xhat, y.dtype)
        if weight is not None:
            branch = branch * weight.to(wide)
        branch = round_if(law, Point.AFFINE, branch, y.dtype)

    if gate is not None:
        gate = gate.to(wide)
        if gate_table is not None:
            gate = round_if(law, Point.TABLE, gate + gate_table.to(wide), y.dtype)
        if tanh:
            gate = round_if(law, Point.TANH, torch.tanh(gate), y.dtype)
        branch = round_if(law, Point.GATED, rows.expand(gate).reshape(x.shape) * branch, y.dtype)

    return (x.to(wide) + branch).to(x.dtype)  # the rounding of the residual
