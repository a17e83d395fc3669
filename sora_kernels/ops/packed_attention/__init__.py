"""Attention inside each segment of a packed sequence, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import backend
from .._attention import fake_bwd, fake_fwd, gradients
from ..windowed_attention import flash_attn_4, prepare_window, windowed_attention
from .checks import (
    check_cu_seqlens,
    check_max_seqlen,
    check_qkv,
    check_scale,
    check_windowed,
    host_lengths,
)
from .config import chip_of, config_for
from .libraries import OWN, Arguments, run_by_library, windowed_library
from .reference import packed_attention_reference
from .work import work_list

if TYPE_CHECKING:
    from ...packing import PackedLayout, Window

__all__ = ["merge", "packed_attention", "prepare_window"]

_OP = "packed_attention"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: Window | tuple[int | None, int | None, int | None] | None = None,
    return_lse: bool = False,
    library: str | None = None,
    deterministic: bool = True,
) -> Any:
    """Attention of every token to the tokens of its own segment.

    ``out = softmax(softmax_scale * q k^T) v`` within each segment, computed block by block as
    FlashAttention-2 does (arXiv:2307.08691); ``reference.py`` holds the definition in plain
    PyTorch. Self-attention takes the segments from ``layout`` or from ``cu_seqlens``.
    Cross-attention adds ``cu_seqlens_k``: segment i of the queries reads segment i of the keys.
    A segment computes the same bits in any pack, and every run gives the same bits.

    With a ``window`` the layout is in tile order, and the grid to be made of each segment attends
    within a 3-D window of tiles (sliding tile attention, arXiv:2502.04507), moved inwards at the
    borders (NATTEN, arXiv:2204.07143); all else in the segment (text, given grids) sees and is
    seen by everything. Time and memory grow with the window, not with the square of the segment.

    Args:
        q: ``[N, H, D]``, D <= 256; fp32, bf16, fp16 (fp64: reference). Any strides with
            ``stride(-1) == 1``, as the views of one packed QKV have; nothing is copied.
        k, v: ``[Nk, Hk, D]``; Hk divides H (grouped or multi-query attention).
        layout: the pack; its lengths are host integers, so nothing waits for the device.
        cu_seqlens: int32 ``[S + 1]`` on the device of q: 0 and the running sum of the lengths,
            up to N. Segments may be empty. Values are checked where reading them is free (CPU).
        max_seqlen: length of the longest segment or a bound of it; a host integer for library
            kernels that ask for one. Default: N.
        cu_seqlens_k, max_seqlen_k: the same for the keys. Default: those of the queries.
        softmax_scale: >= 0; default ``D ** -0.5``.
        causal: query i of a segment sees the keys ``j <= i + len_k - len_q`` (bottom-right).
        window: tiles (t, h, w) that a query sees, its own in the middle: odd numbers, or None for a
            whole axis; or a :class:`~sora_kernels.packing.Window`, which also has truncated
            borders, block-causal time and a sink. Self-attention only. Inside ``torch.compile``
            on a GPU, :func:`prepare_window` must have seen the layout. On Hopper and Blackwell
            also ``library="flash_attn_4"``, by its block sparsity.
        return_lse: also return the natural-log LSE, differentiable, for :func:`merge`.
        library: what runs a call on a GPU: a name in ``libraries.LIBRARIES`` (cuDNN and flash
            attention through PyTorch, flash-attn 2 to 4), ``"own"`` for our kernel. Default: what
            the committed measurements of the chip prefer, see :func:`sora_kernels.explain`. A
            library has its own order of sums: what is said of bits holds for our kernel.
        deterministic: False allows libraries whose backward is not.

    Returns:
        out ``[N, H, D]`` in the dtype of q; with ``return_lse`` also lse, fp32 ``[H, N]`` (fp64
        for fp64 inputs). A query that sees no key gets ``out = 0`` and ``lse = -inf``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; a
            window meets a layout in raster order or a segment with two grids to be made.
    """
    check_qkv(q, k, v)
    scale = check_scale(softmax_scale, q.shape[2])
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if window is not None:
        tiles = check_windowed(q, k, layout, window, cu_seqlens, cu_seqlens_k, causal)
        assert layout is not None  # checked
        name = OWN
        if q.is_cuda or library is not None:
            name = windowed_library(
                q, k, layout.max_seqlen, library, training=wants_grad, return_lse=return_lse,
                deterministic=deterministic,
            )  # fmt: skip
        if name == OWN:
            result = windowed_attention(q, k, v, layout, tiles, scale)
        else:
            chip = chip_of(q)
            assert chip is not None  # no library runs elsewhere
            result = flash_attn_4.run(q, k, v, layout, tiles, scale, chip, deterministic)
        return result if return_lse else result[0]
    if (layout is None) == (cu_seqlens is None):
        got = "neither" if layout is None else "both"
        raise ValueError(f"layout: expected either a layout or cu_seqlens, got {got}")
    if layout is not None:
        if layout.num_tokens != q.shape[0]:
            raise ValueError(f"layout: expected {q.shape[0]} tokens, got {layout.num_tokens}")
        cu_seqlens, max_seqlen = layout.cu_seqlens, layout.max_seqlen
    assert cu_seqlens is not None  # one of the two was given
    check_cu_seqlens("cu_seqlens" if layout is None else "layout", cu_seqlens, q)
    max_seqlen = check_max_seqlen("max_seqlen", max_seqlen, q.shape[0])
    cross = cu_seqlens_k is not None
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k: expected one because k has {k.shape[0]} tokens and q "
                f"{q.shape[0]}, got None"
            )
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    else:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_k.shape[0] != cu_seqlens.shape[0]:
            raise ValueError(
                f"cu_seqlens_k: expected {cu_seqlens.shape[0] - 1} segments as the queries have, "
                f"got {cu_seqlens_k.shape[0] - 1}"
            )
        max_seqlen_k = check_max_seqlen("max_seqlen_k", max_seqlen_k, k.shape[0])

    if q.is_cuda or library is not None:
        call = Arguments(
            q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale, causal, return_lse,
            deterministic,
        )  # fmt: skip
        ran, result = run_by_library(call, library, wants_grad)
        if ran:
            return result
    chosen = backend.choose(_OP, q)
    if chosen == "reference":
        seqlens = host_lengths("cu_seqlens", cu_seqlens, q.shape[0])
        seqlens_k = host_lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0]) if cross else seqlens
        out, lse = packed_attention_reference(q, k, v, seqlens, seqlens_k, scale, causal)
        return (out, lse) if return_lse else out
    works: tuple[Tensor | None, ...] = (None, None, None)
    if chosen == "triton":
        works = _works(q, k, cu_seqlens, cu_seqlens_k if cross else None, layout, wants_grad)
    statics = (max_seqlen, max_seqlen_k, scale, causal)
    if wants_grad:
        # torch.compile refuses one tensor in two places of a Function: what repeats becomes None.
        if torch.compiler.is_compiling():
            k = k.view_as(k) if k is q else k
            v = v.view_as(v) if v is k or v is q else v
        distinct = [None if w is works[0] else w for w in works[1:]]
        cu_k = cu_seqlens_k if cross else None
        out, lse = _PackedAttention.apply(
            chosen, q, k, v, cu_seqlens, cu_k, works[0], *distinct, *statics
        )
    else:
        run = backend.implementation(_OP, "fwd", chosen, q)
        out, lse = run(q, k, v, cu_seqlens, cu_seqlens_k, works[0], *statics)
    return (out, lse) if return_lse else out


def merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Combines attention of the same queries over two disjoint sets of keys.

    Args:
        out, out2: ``[N, H, D]``.
        lse, lse2: natural-log LSE of each, ``[H, N]``. Differentiable in all four.

    Returns:
        The out (dtype of ``out``) and lse that one call over all keys would give.

    Raises:
        ValueError: the shapes of the two results differ or do not belong together.
    """
    n, heads = out.shape[:2]
    if out2.shape != out.shape or lse.shape != (heads, n) or lse2.shape != (heads, n):
        raise ValueError(
            "merge: expected out, out2 [N, H, D] and lse, lse2 [H, N], got "
            f"{[tuple(x.shape) for x in (out, out2, lse, lse2)]}"
        )
    # The larger of the two is a shift like in any softmax; where both are -inf it must not be used.
    top = torch.maximum(lse, lse2).detach()
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight, weight2 = torch.exp(lse - top), torch.exp(lse2 - top)
    total = weight + weight2
    blind = total == 0
    safe = total.masked_fill(blind, 1.0)
    share, share2 = ((w / safe).mT[..., None] for w in (weight, weight2))
    merged = torch.log(safe) + top
    return (
        (share * out + share2 * out2).to(out.dtype),
        merged.masked_fill(blind, float("-inf")),
    )


# --- work lists ---------------------------------------------------------------------------------


def _works(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    layout: PackedLayout | None,
    wants_grad: bool,
) -> tuple[Tensor | None, ...]:
    """The work lists of the forward, dq and dk/dv kernels.

    Eager calls take the layout's, which are built once per pack. A compiled graph builds them from
    ``cu_seqlens`` in plain PyTorch, once for all layers: equal subgraphs are merged.
    """
    config = config_for(q)
    lists: dict[tuple[str, int], Tensor] = {}

    def get(side: str, block: int) -> Tensor:
        if cu_k is None:
            side = "q"
        if (side, block) not in lists:
            if cu_k is not None and side == "q":
                made = work_list(cu_q, q.shape[0], block, cu_k.diff())
            elif cu_k is not None:
                made = work_list(cu_k, k.shape[0], block, cu_q.diff())
            elif layout is not None and not torch.compiler.is_compiling():
                made = layout.work(block)
            else:
                made = work_list(cu_q, q.shape[0], block)
            lists[side, block] = made
        return lists[side, block]

    work = get("q", config.fwd.block_m)
    if not wants_grad:
        return work, None, None
    return work, get("q", config.dq.block_m), get("k", config.dkv.block_n)


# --- autograd -----------------------------------------------------------------------------------


class _PackedAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse; the backward computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, chosen: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None,
        work: Tensor | None, work_dq: Tensor | None, work_dkv: Tensor | None, *statics: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A missing cu_k is cu_q, a missing work_dq or work_dkv is work."""
        cu_k = cu_q if cu_k is None else cu_k
        run = backend.implementation(_OP, "fwd", chosen, q)
        out, lse = run(q, k, v, cu_q, cu_k, work, *statics)
        ctx.chosen = chosen
        ctx.statics = statics
        ctx.set_materialize_grads(False)
        work_dq = work if work_dq is None else work_dq
        work_dkv = work if work_dkv is None else work_dkv
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, work_dq, work_dkv)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return None, *gradients(_OP, ctx, dout, dlse), *(None,) * (5 + len(ctx.statics))


# --- registration -------------------------------------------------------------------------------


_LENGTHS = "SymInt max_seqlen, SymInt max_seqlen_k, float scale, bool causal"
backend.register(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? work, "
    f"{_LENGTHS}) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? work_dq, Tensor? work_dkv, {_LENGTHS}, "
    "bool need_dq, bool need_dkv) -> (Tensor, Tensor, Tensor)",
    fake_fwd,
    fake_bwd,
    cpu="cpu",
)
