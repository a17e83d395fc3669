"""Messages of ring attention: rows of keys out, their gradients home."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from ..packing import LayoutShard
from ..packing.shard import RingPlan


@dataclass(frozen=True)
class Ring:
    """One call of ring attention: who takes part, and what every block of it shares."""

    shard: LayoutShard
    group: dist.ProcessGroup | None
    chosen: str
    scale: float
    causal: bool
    plan: RingPlan


class Transfer:
    """One message out, one message in, both optional, under way."""

    def __init__(
        self, ring: Ring, out: Tensor | None, to: int, into: Tensor | None, source: int
    ) -> None:
        world = ring.shard.world
        ops: list[dist.P2POp] = []
        if out is not None:
            ops.append(dist.P2POp(dist.isend, out, group=ring.group, group_peer=to % world))
        if into is not None:
            ops.append(dist.P2POp(dist.irecv, into, group=ring.group, group_peer=source % world))
        self.received = into
        self._sent = out  # must live until it has gone
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor | None:
        for work in self._works:
            work.wait()
        return self.received


class Keys:
    """Keys and values of other ranks, fetched one step ahead of the computation.

    Every rank posts its transfers in the order of the plan's steps (which all ranks share), so the
    messages of two ranks always meet, also on a backend that runs them strictly in order.
    """

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self._ring = ring
        self._like = k
        # Rows of keys and values next to each other: any range of rows is one message.
        self._own = torch.stack((k, v), 1) if ring.plan.sends else None
        _introduce(ring.group, k)
        self._left = iter(ring.plan.steps)
        self._next = self._post()

    def _post(self) -> Transfer | None:
        step = next(self._left, None)
        if step is None:
            return None
        plan, rank = self._ring.plan, self._ring.shard.rank
        rows = plan.sends.get(step)
        out = None if rows is None or self._own is None else self._own[rows]
        visit = plan.visits.get(step)
        into = None
        if visit is not None:
            into = self._like.new_empty((visit.keys.longest, 2, *self._like.shape[1:]))
        return Transfer(self._ring, out, rank + step, into, rank - step)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """k and v of the next step, if it has any here; those of the step after it set out."""
        assert self._next is not None
        arrived = self._next.wait()
        self._next = self._post()
        return None if arrived is None else (arrived[:, 0], arrived[:, 1])


_introduced: WeakSet[dist.ProcessGroup] = WeakSet()


def _introduce(group: dist.ProcessGroup | None, x: Tensor) -> None:
    """NCCL wants a call by all ranks before the first messages between some of them."""
    group = dist.group.WORLD if group is None else group
    if not x.is_cuda or group is None or group in _introduced:
        return
    dist.all_reduce(x.new_zeros(1, dtype=torch.float32), group=group)
    _introduced.add(group)
