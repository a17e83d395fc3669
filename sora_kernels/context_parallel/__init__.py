"""Context parallelism: attention of one packed batch whose tokens are spread over several ranks.

Every rank of a torch.distributed group holds a slice of the tokens, ``layout.shard(rank, world)``.
Norms, modulation, RoPE and MLPs run on the slice alone, and attention is one of these::

    shard = layout.shard(dist.get_rank(group), dist.get_world_size(group))
    x = shard.take(x_of_the_pack)                        # [n_r, D]; or made on the rank
    ...
    q, k = qk_norm_rope(q, k, weight_q, weight_k, shard.rope((16, 56, 56)))
    out = ulysses_attention(q, k, v, shard, group=group)  # [n_r, H, D]

- :func:`ulysses_attention` gathers the tokens and scatters the heads, and runs `packed_attention`
  on the whole pack. Any option of `packed_attention` works; the heads limit the number of ranks.
- :func:`ring_attention` leaves queries and heads where they are. Keys and values visit the ranks
  that need them. Any number of heads and ranks; memory grows with the slice, not with the pack.

Keep the shard for all layers of a model: it caches the plan of the ring and the RoPE tables.
Both give what one process would, forward and backward, and the same bits in every run. They are
collective: every rank of the group calls them in the same order, with the same options and with
``requires_grad`` on the same arguments, and runs the backward if one rank does. The gradients of
what ranks share (weights) are sums over ranks as in data parallelism. Under ``torch.compile`` both
are graph breaks.
"""

from .ring import ring_attention
from .ulysses import ulysses_attention

__all__ = ["ring_attention", "ulysses_attention"]
