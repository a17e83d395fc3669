"""Attention under a 3-D window of tiles: what `packed_attention(..., window=)` runs.

Internal: `packed_attention` checks the arguments and its docstring holds the contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import backend
from .._attention import fake_bwd, fake_fwd, gradients
from . import flash_attn_4
from .reference import windowed_attention_reference

if TYPE_CHECKING:
    from ...packing import PackedLayout
    from ...packing.windows import Window

__all__ = ["prepare_window", "windowed_attention"]

_OP = "windowed_attention"


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: Window, scale: float
) -> tuple[Tensor, Tensor]:
    """(out `[N, H, D]`, lse fp32 `[H, N]`) of checked arguments."""
    table = layout.window_table()
    chosen = backend.choose(_OP, q)
    if chosen == "reference":
        return windowed_attention_reference(q, k, v, layout, window, scale)
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    works: tuple[Tensor | None, ...] = (None, None, None)
    if chosen == "triton":
        works = _works(q, layout, window, wants_grad)
    ints = window.as_ints()
    if wants_grad:
        # torch.compile refuses one tensor in two places of a Function: what repeats becomes None.
        if torch.compiler.is_compiling():
            k = k.view_as(k) if k is q else k
            v = v.view_as(v) if v is k or v is q else v
        work_dq = None if works[1] is works[0] else works[1]
        out, lse = _WindowedAttention.apply(
            chosen, q, k, v, layout.cu_seqlens, table, works[0], work_dq, works[2], ints, scale
        )
        return out, lse
    run = backend.implementation(_OP, "fwd", chosen, q)
    out, lse = run(q, k, v, layout.cu_seqlens, table, works[0], ints, scale)
    return out, lse


def prepare_window(
    layout: PackedLayout, window: Any, q: Tensor, library: str | None = None
) -> None:
    """Builds the lists that `packed_attention(..., window=window)` reads from ``layout``.

    A call outside `torch.compile` builds what is missing by itself. A compiled region cannot:
    prepare each new layout before it enters one. On the CPU there is nothing to build.

    Args:
        window, library: as given to `packed_attention`.
        q: any tensor with the device, dtype and head dim of the queries, ``[..., D]``.

    Raises:
        ValueError: the layout is in raster order or a segment has two grids to be made.
    """
    from ...packing.windows import Window
    from ..packed_attention.config import chip_of
    from ..packed_attention.libraries import may_run_windows

    layout.window_table()
    chip = chip_of(q)
    if chip is not None and may_run_windows("flash_attn_4", library, chip):
        flash_attn_4.tensors_for(layout, Window.of(window), chip)
    if backend.choose(_OP, q) == "triton":
        _works(q.reshape(-1, 1, q.shape[-1]), layout, Window.of(window), True)


def _works(
    q: Tensor, layout: PackedLayout, window: Window, wants_grad: bool
) -> tuple[Tensor | None, ...]:
    """The layout's work lists of the forward, dq and dk/dv kernels."""
    from .config import config_for  # late: it reads packed_attention's, which imports this module

    config = config_for(q)
    work = layout.window_work(config.fwd.block_m, window, "query")
    if not wants_grad:
        return work, None, None
    return (
        work,
        layout.window_work(config.dq.block_m, window, "query"),
        layout.window_work(config.dkv.block_n, window, "key"),
    )


# --- autograd -----------------------------------------------------------------------------------


class _WindowedAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse; the backward computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, chosen: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, table: Tensor,
        work: Tensor | None, work_dq: Tensor | None, work_dkv: Tensor | None,
        window: tuple[int, ...], scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A missing work_dq is work."""
        run = backend.implementation(_OP, "fwd", chosen, q)
        out, lse = run(q, k, v, cu_seqlens, table, work, window, scale)
        ctx.chosen = chosen
        ctx.statics = (window, scale)
        ctx.set_materialize_grads(False)
        work_dq = work if work_dq is None else work_dq
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, table, work_dq, work_dkv)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return None, *gradients(_OP, ctx, dout, dlse), *(None,) * 7


# --- registration -------------------------------------------------------------------------------


backend.register(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor table, Tensor? work, int[] window, "
    "float scale) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, Tensor table, Tensor? work_dq, Tensor? work_dkv, int[] window, "
    "float scale, bool need_dq, bool need_dkv) -> (Tensor, Tensor, Tensor)",
    fake_fwd,
    fake_bwd,
    cpu="cpu",
)
