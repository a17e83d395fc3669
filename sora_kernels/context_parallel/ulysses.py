"""Context parallelism by heads: all tokens of some heads on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.packed_attention import packed_attention
from ..packing import LayoutShard
from .checks import check


@torch.compiler.disable
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: LayoutShard,
    *,
    group: dist.ProcessGroup | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`packed_attention` of the whole pack, heads spread over the ranks (DeepSpeed-Ulysses,
    arXiv:2309.14509).

    One all-to-all brings q, k and v of all tokens for H / world heads, a second one takes the
    result (and the LSE) back.

    Args:
        q: ``[n_r, H, D]``, this rank's tokens; H is a multiple of world.
        k, v: ``[n_r, Hk, D]``. Hk is a multiple of world, or world a multiple of Hk: then a head is
            sent to several ranks, and its gradients are added in the order of the ranks.
        shard: ``layout.shard(rank, world)`` of this rank in ``group``.
        group: the process group; None = all processes.
        softmax_scale, causal, return_lse: see `packed_attention`.
        options: further keywords of `packed_attention`, such as windows.

    Returns:
        out ``[n_r, H, D]``; with ``return_lse`` also lse ``[H, n_r]``. Differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, the group is
            not the one the shard was made for, or the heads cannot be divided.
    """
    check(q, k, v, shard, group)
    rest = {"softmax_scale": softmax_scale, "causal": causal, "return_lse": return_lse, **options}
    world = shard.world
    if world == 1:
        return packed_attention(q, k, v, shard.layout, **rest)
    heads, heads_k = q.shape[1], k.shape[1]
    if heads % world:
        raise ValueError(f"q: expected a number of heads divisible by world ({world}), got {heads}")
    if heads_k % world and world % heads_k:
        raise ValueError(
            f"k: expected a number of heads that divides world ({world}) or is divisible by it, "
            f"got {heads_k}"
        )
    # Rank p takes the query heads [p H/world, (p+1) H/world) and the key heads they read.
    repeats = max(1, world // heads_k)
    k, v = (x[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for x in (k, v))
    packed = torch.cat([x.unflatten(1, (world, -1)).transpose(0, 1) for x in (q, k, v)], 2)
    mine, all_rows = [shard.num_tokens] * world, _rows_of(shard)
    # Ranks come in order and so do their slices: what arrives is the pack.
    (gathered,) = _AllToAll.apply(group, mine, all_rows, packed.flatten(0, 1))
    q_all, k_all, v_all = gathered.split([x.shape[1] // world for x in (q, k, v)], 1)
    result = packed_attention(q_all, k_all, v_all, shard.layout, **rest)
    if not return_lse:
        (back,) = _AllToAll.apply(group, all_rows, mine, result)
        return _heads_together(back, world)
    back, lse = _AllToAll.apply(group, all_rows, mine, result[0], result[1].mT)
    return _heads_together(back, world), _heads_together(lse, world).mT.contiguous()


class _AllToAll(torch.autograd.Function):
    """Sends `sends[p]` rows to rank p and receives `receives[p]`, for each of several tensors.

    The backward exchanges the gradient of every tensor, zeros where it was not used: all ranks then
    make the same calls, whatever their losses read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup | None,
        sends: list[int],
        receives: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call = group, receives, sends  # the other way round
        return _all_to_all(group, sends, receives, tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, sends, receives = ctx.call
        return None, None, None, *_all_to_all(group, sends, receives, grads)


def _all_to_all(
    group: dist.ProcessGroup | None,
    sends: list[int],
    receives: list[int],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    received = tuple(x.new_empty((sum(receives), *x.shape[1:])) for x in tensors)
    sent = [x.contiguous() for x in tensors]
    works = [
        dist.all_to_all_single(new, old, receives, sends, group=group, async_op=True)
        for new, old in zip(received, sent, strict=True)
    ]
    for work in works:
        work.wait()
    return received


def _rows_of(shard: LayoutShard) -> list[int]:
    return [b - a for a, b in zip(shard.bounds, shard.bounds[1:], strict=False)]


def _heads_together(x: Tensor, world: int) -> Tensor:
    """`[world * n, heads, ...]` -> `[n, world * heads, ...]`."""
    return x.unflatten(0, (world, -1)).transpose(0, 1).flatten(1, 2)
