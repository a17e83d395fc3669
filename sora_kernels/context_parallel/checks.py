"""What both kinds of context parallelism accept."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..ops.packed_attention.checks import check_qkv
from ..packing import LayoutShard


def check(
    q: Tensor, k: Tensor, v: Tensor, shard: LayoutShard, group: dist.ProcessGroup | None
) -> None:
    check_qkv(q, k, v)
    if not isinstance(shard, LayoutShard):
        raise TypeError(f"shard: expected layout.shard(rank, world), got {type(shard).__name__}")
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] != shard.num_tokens:
            raise ValueError(
                f"{name}: expected the {shard.num_tokens} tokens of the shard, got {x.shape[0]}"
            )
    if shard.layout.device != q.device:
        raise ValueError(
            f"shard: expected a layout on the device of q, {q.device}, got {shard.layout.device}"
        )
    if shard.world == 1 and group is None:  # works without torch.distributed
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"group: expected torch.distributed to be initialized for {shard.world} ranks, got no "
            "process group"
        )
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process belongs to, got another")
    if (rank, world) != (shard.rank, shard.world):
        raise ValueError(
            f"shard: expected rank {rank} of {world}, as in the group, got rank {shard.rank} of "
            f"{shard.world}"
        )
