"""Context parallelism by blocks of keys: they visit the ranks whose queries see them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backend
from ..ops.packed_attention import packed_attention
from ..ops.packed_attention.checks import check_scale
from ..ops.packed_attention.config import config_for
from ..ops.packed_attention.reference import packed_attention_reference
from ..packing import LayoutShard
from ..packing.shard import Pieces
from .checks import check
from .exchange import Keys, Ring, Transfer
from .reference import reference_backward

_OP = "packed_attention"


@torch.compiler.disable
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: LayoutShard,
    *,
    group: dist.ProcessGroup | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> Any:
    """`packed_attention` of the whole pack, keys and values visiting the ranks that need them
    (Ring Attention, arXiv:2310.01889).

    At step i rank r attends to rows of rank r - i, and the rows of step i + 1 are already on their
    way. Only rows of a segment that reaches into both slices travel, straight to where they are
    needed. Steps at which no rank needs any are skipped, and under ``causal`` keys of later ranks
    stay at home. Partial results are combined in fp32 by their LSE, in the order of the steps, and
    rounded once. The backward saves the rank's own q, k, v, out and lse; keys travel again, and
    their gradients return to the owner, who adds them in fp32 in the order of the steps. The
    backend "reference" makes the same exchange with plain PyTorch formulas, in any float dtype.

    Args:
        q: ``[n_r, H, D]``, this rank's tokens.
        k, v: ``[n_r, Hk, D]``; Hk divides H.
        shard: ``layout.shard(rank, world)`` of this rank in ``group``.
        group: the process group; None = all processes.
        softmax_scale, causal, return_lse: see `packed_attention`. Slices of the same size have
            unequal work under ``causal``: the last rank's is the longest.

    Returns:
        out ``[n_r, H, D]``; with ``return_lse`` also lse ``[H, n_r]``. Differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, or the group
            is not the one the shard was made for.
    """
    check(q, k, v, shard, group)
    scale = check_scale(softmax_scale, q.shape[2])
    if shard.world == 1:
        return packed_attention(
            q, k, v, shard.layout, softmax_scale=scale, causal=causal, return_lse=return_lse
        )
    ring = Ring(shard, group, backend.choose(_OP, q), scale, causal, shard.ring_plan(causal))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _RingAttention.apply(ring, q, k, v)
    else:
        out, lse = _ring_forward(ring, q, k, v)
    return (out, lse) if return_lse else out


def _ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention of the slice, then the visiting keys.

    Causal: query i of a segment sees its keys j <= i (queries and keys of a segment are as many,
    so bottom-right alignment adds nothing). Keys of an earlier rank lie before every query here:
    all are seen. Keys of a later rank lie behind: none are, and they are never sent. In the rank's
    own slice a segment has the same rows [a, b) of queries and keys, j - a <= i - a is the same
    comparison, and equal lengths make the local bottom-right alignment the diagonal of the whole.
    Every query sees at least its own key in the first call, so no LSE below is -inf.
    """
    plan = ring.plan
    keys = Keys(ring, k, v)
    out, lse = _forward(ring, q, k, v, plan.own, plan.own, ring.causal)
    total = out.to(torch.promote_types(out.dtype, torch.float32)) if plan.visits else out
    for step in plan.steps:
        arrived = keys.take()
        if arrived is None:
            continue
        visit = plan.visits[step]
        rows = visit.query_rows
        part, part_lse = _forward(
            ring, q[rows], arrived[0], arrived[1], visit.queries, visit.keys, False
        )
        seen, seen_lse = total[rows], lse[:, rows]
        both_lse = torch.logaddexp(seen_lse, part_lse)
        seen.mul_(torch.exp(seen_lse - both_lse).mT[..., None])
        seen.add_(torch.exp(part_lse - both_lse).mT[..., None] * part)
        seen_lse.copy_(both_lse)
    return total.to(out.dtype), lse


class _RingAttention(torch.autograd.Function):
    """Saves the rank's own q, k, v, out and lse; keys travel again in the backward."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _ring_forward(ring, q, k, v)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = out.new_zeros(out.shape) if dout is None else dout  # only the lse was used
        _, need_q, need_k, need_v = ctx.needs_input_grad
        needs = (need_q, need_k or need_v)
        dq, dk, dv = _ring_backward(ctx.ring, dout, dlse, q, k, v, out, lse, needs)
        return None, dq if need_q else None, dk if need_k else None, dv if need_v else None


def _ring_backward(
    ring: Ring, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv. With the LSE of all keys, p = exp(s - lse) of any block is final: the gradient
    of attention is a plain sum over blocks, each of which is the backward of `packed_attention`.
    """
    plan, rank = ring.plan, ring.shard.rank
    need_dq, need_dkv = needs
    keys = Keys(ring, k, v)
    grads = _backward(ring, dout, dlse, q, k, v, out, lse, plan.own, plan.own, ring.causal, needs)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (x.to(wide) for x in grads)
    home: tuple[Transfer, slice | None] | None = None

    def add(returned: tuple[Transfer, slice | None] | None) -> None:
        if returned is None:
            return
        share, rows = returned[0].wait(), returned[1]
        if share is not None and rows is not None:
            dk[rows].add_(share[:, 0])
            dv[rows].add_(share[:, 1])

    for step in plan.steps:
        arrived = keys.take()
        share: Tensor | None = None
        if arrived is not None:
            visit = plan.visits[step]
            rows = visit.query_rows
            dlse_rows = None if dlse is None else dlse[:, rows]
            part_q, part_k, part_v = _backward(
                ring, dout[rows], dlse_rows, q[rows], arrived[0], arrived[1], out[rows],
                lse[:, rows], visit.queries, visit.keys, False, needs,
            )  # fmt: skip
            if need_dq:
                dq[rows].add_(part_q)
            if need_dkv:
                share = torch.stack((part_k, part_v), 1)
        if need_dkv:  # the last step's shares have travelled meanwhile
            add(home)
            sent = plan.sends.get(step)
            into = None if sent is None else k.new_empty((sent.stop - sent.start, 2, *k.shape[1:]))
            home = Transfer(ring, share, rank - step, into, rank + step), sent
    add(home)
    dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv


def _forward(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, queries: Pieces, keys: Pieces, causal: bool
) -> tuple[Tensor, Tensor]:
    if ring.chosen == "reference":
        lengths = queries.lengths, keys.lengths
        return packed_attention_reference(q, k, v, *lengths, ring.scale, causal)
    work = queries.work(config_for(q).fwd.block_m) if ring.chosen == "triton" else None
    run = backend.implementation(_OP, "fwd", ring.chosen, q)
    cu = queries.cu_seqlens, keys.cu_seqlens
    result: tuple[Tensor, Tensor] = run(
        q, k, v, *cu, work, queries.longest, keys.longest, ring.scale, causal
    )
    return result


def _backward(
    ring: Ring, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, queries: Pieces, keys: Pieces, causal: bool, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if ring.chosen == "reference":
        lengths = queries.lengths, keys.lengths
        return reference_backward(dout, dlse, q, k, v, out, lse, *lengths, ring.scale, causal)
    works: tuple[Tensor | None, Tensor | None] = (None, None)
    if ring.chosen == "triton":
        config = config_for(q)
        works = queries.work(config.dq.block_m), keys.work(config.dkv.block_n)
    run = backend.implementation(_OP, "bwd", ring.chosen, q)
    result: tuple[Tensor, Tensor, Tensor] = run(
        dout, dlse, q, k, v, out, lse.contiguous(), queries.cu_seqlens, keys.cu_seqlens, *works,
        queries.longest, keys.longest, ring.scale, causal, *needs,
    )  # fmt: skip
    return result
