"""guided_step: classifier-free guidance and one Euler step of the flow, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend as _backend
from ...rows import RowMap
from .._modulation import as_tokens, check_branch, check_tokens, resolve_rows, unit_stride
from .reference import guided_step_reference, velocity_reference

OP = "guided_step"
DCOND, DUNCOND = 1, 2  # bits of `needs`, in the order of the backward's results


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    dt: float | Tensor,
    guidance: float | Tensor = 1.0,
    rescale: float = 0.0,
    rows: RowMap | None = None,
) -> Tensor:
    """``x + dt * v`` with ``v = uncond + guidance * (cond - uncond)``.

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and an Euler step of a rectified
    flow. The state stays fp32 beside half-precision velocities; arithmetic is fp32 with one
    rounding at the end. ``dt`` and ``guidance`` may differ from sample to sample of a batch, or
    from clip to clip of a pack.

    Args:
        x: the state, ``[B, ...]`` or packed ``[N, D]``; fp32, bf16 or fp16 (fp64 runs the
            reference).
        cond: velocity for the prompt, shape of ``x``; dtype of ``x``, or bf16 or fp16 beside fp32.
        uncond: velocity without the prompt, like ``cond``; None: ``v = cond``, guidance unused.
        dt: time to the next step (negative towards the clean clip when t = 1 is noise), a number
            or ``[R]``.
        guidance: scale, a number or ``[R]``; 1 is the prompt alone.
        rescale: phi in [0, 1] of arXiv 2305.08891, section 3.4: v is scaled by
            ``phi * std(cond) / std(v) + 1 - phi`` with the deviations of one sample (one row). The
            deviations are PyTorch reductions, the step itself stays one pass.
        rows: for packed ``x``: a :class:`RowMap`, R = ``rows.num_rows``. Without it R = B for
            ``[B, ...]`` with three dimensions or more, and 1 for ``[N, D]``.

    Returns:
        The next state, shape and dtype of ``x``, contiguous. Differentiable in ``x``, ``cond`` and
        ``uncond``, not in ``dt`` and ``guidance``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, range or device, by name.
    """
    check_tokens(x)
    check_branch(cond, "cond", x)
    if uncond is not None:
        check_branch(uncond, "uncond", x)
        if uncond.dtype != cond.dtype:
            raise TypeError(f"uncond: expected {cond.dtype} (that of cond), got {uncond.dtype}")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale: expected a number in [0, 1], got {rescale}")
    row_map, shape = _layout(x, rows)
    x_tokens = unit_stride(x.reshape(shape))
    cond_tokens = unit_stride(cond.reshape(shape))
    uncond_tokens = None if uncond is None else unit_stride(uncond.reshape(shape))
    scale = _per_row(guidance, "guidance", row_map, x)
    weight = _per_row(dt, "dt", row_map, x)
    if rescale and uncond is not None:
        weight = weight * _rescale(cond_tokens, uncond_tokens, scale, row_map, rescale)
    chosen = _backend.choose(OP, x) if x.numel() else "reference"
    if weight.requires_grad and chosen != "reference":
        chosen = _backend.fall_back(OP, x, "with rescale, gradients pass through the deviations")
    if chosen == "reference":
        out = guided_step_reference(
            x_tokens.flatten(0, 1),
            cond_tokens.flatten(0, 1),
            None if uncond_tokens is None else uncond_tokens.flatten(0, 1),
            scale,
            weight,
            _row_of_token(row_map, x.device),
        )
    elif torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, cond, uncond)
    ):
        out = _GuidedStep.apply(
            x_tokens, cond_tokens, uncond_tokens, scale, weight, row_map, chosen
        )
    else:
        out = _forward(chosen, x_tokens, cond_tokens, uncond_tokens, scale, weight, row_map)
    return out.view(x.shape)


def _layout(x: Tensor, rows: RowMap | None) -> tuple[RowMap, tuple[int, int, int]]:
    """The row map, and ``x`` seen as ``[B, L, D]`` with D wide enough for wide accesses."""
    if rows is not None or x.dim() < 3:
        row_map, _ = resolve_rows(x, rows, None)
        return row_map, tuple(as_tokens(x).shape)  # type: ignore[return-value]
    axis = x.dim() - 1
    while axis > 1 and x.shape[axis:].numel() < 512:
        axis -= 1
    width = x.shape[axis:].numel()
    length = x.shape[1:axis].numel()
    return RowMap.uniform(x.shape[0], length), (x.shape[0], length, width)


def _per_row(value: float | Tensor, name: str, rows: RowMap, x: Tensor) -> Tensor:
    """A number, or one per row, as ``[R]``: fp32, for the reference of fp64 states fp64."""
    dtype, device = torch.promote_types(x.dtype, torch.float32), x.device
    if not isinstance(value, Tensor):
        return torch.full((rows.num_rows,), float(value), dtype=dtype, device=device)
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no grad")
    if value.shape not in ((), (rows.num_rows,)):
        raise ValueError(f"{name}: expected shape ({rows.num_rows},), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} (that of x), got {value.device}")
    return value.to(dtype).expand(rows.num_rows).contiguous()


def _row_of_token(rows: RowMap, device: torch.device) -> Tensor:
    if rows.index is not None:
        return rows.index.long()
    tokens = torch.arange(rows.num_tokens, device=device)
    return tokens // max(rows.tokens_per_row, 1)


def _rescale(
    cond: Tensor, uncond: Tensor | None, guidance: Tensor, rows: RowMap, phi: float
) -> Tensor:
    """``phi * std(cond) / std(v) + 1 - phi`` per row, ``[R]``; 1 for a row without tokens."""
    of_token = _row_of_token(rows, cond.device)
    flat = cond.flatten(0, 1)
    free = None if uncond is None else uncond.flatten(0, 1)
    compute = torch.promote_types(cond.dtype, torch.float32)
    v = velocity_reference(flat, free, guidance[of_token, None], compute)
    ratio = _std(flat.to(compute), rows) / _std(v, rows)
    # A velocity without any deviation has nothing to rescale.
    ratio = torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))
    return (phi * ratio + (1.0 - phi)).to(guidance.dtype)


def _std(v: Tensor, rows: RowMap) -> Tensor:
    """Deviation of the values of each row (divided by n - 1), by sums in a fixed order."""

    def row_sums(per_token: Tensor) -> Tensor:
        if rows.offsets is None:
            return per_token.view(rows.num_rows, -1).sum(1)
        if rows.order is not None:
            per_token = per_token[rows.order.long()]
        return torch.segment_reduce(per_token, "sum", offsets=rows.offsets.long())

    count = row_sums(torch.full_like(v[:, 0], v.shape[1]))
    mean = row_sums(v.sum(1)) / count
    centred = v - mean[_row_of_token(rows, v.device), None]
    return (row_sums(centred.square().sum(1)) / (count - 1)).sqrt()


def _forward(
    chosen: str,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    weight: Tensor,
    rows: RowMap,
) -> Tensor:
    run = _backend.implementation(OP, "fwd", chosen, x)
    return run(x, cond, uncond, guidance, weight, rows.index, rows.tokens_per_row)


class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        guidance: Tensor,
        weight: Tensor,
        rows: RowMap,
        chosen: str,
    ) -> Tensor:
        ctx.save_for_backward(guidance, weight, rows.index)
        ctx.chosen, ctx.tokens_per_row = chosen, rows.tokens_per_row
        ctx.dtype, ctx.guided = cond.dtype, uncond is not None
        return _forward(chosen, x, cond, uncond, guidance, weight, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        guidance, weight, index = ctx.saved_tensors
        needs_x, needs_cond, needs_uncond = ctx.needs_input_grad[:3]
        needs = DCOND * needs_cond + DUNCOND * needs_uncond
        dcond = duncond = None
        if needs:
            run = _backend.implementation(OP, "bwd", ctx.chosen, dout)
            dcond, duncond = run(
                as_tokens(dout), guidance, weight, index, ctx.tokens_per_row, ctx.dtype,
                ctx.guided, needs,
            )  # fmt: skip
        return (
            dout if needs_x else None,
            dcond if needs_cond else None,
            duncond if needs_uncond else None,
            *(None,) * 4,
        )


# --- raw ops ------------------------------------------------------------------------------------


def _fake_fwd(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype, _, needs = args[-3:]
    dcond = dout.new_empty(dout.shape if needs & DCOND else (0,), dtype=dtype)
    return dcond, dout.new_empty(dout.shape if needs & DUNCOND else (0,), dtype=dtype)


_backend.register(
    OP,
    "(Tensor x, Tensor cond, Tensor? uncond, Tensor guidance, Tensor weight, Tensor? index, "
    "SymInt tokens_per_row) -> Tensor",
    "(Tensor dout, Tensor guidance, Tensor weight, Tensor? index, SymInt tokens_per_row, "
    "ScalarType dtype, bool guided, int needs) -> (Tensor, Tensor)",
    _fake_fwd,
    _fake_bwd,
)
