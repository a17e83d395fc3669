"""Planning a whole epoch at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import Int64Array, check_lengths, keys, offsets_of, sums
from .bins import Implementation, lower_bound
from .cost import Cost
from .stream import PackStream


@dataclass(frozen=True)
class Plan:
    """An epoch: which clips form which pack, and which rank takes it at which step.

    Attributes:
        clips: int64, clip numbers, pack after pack.
        offsets: int64 `[P + 1]`, where each pack starts in `clips`. Pack `step * world + rank` is
            what `rank` takes at `step`, so every rank has P / world packs.
        lengths, costs: int64, of all clips, by clip number.
        capacity, world: as given.
    """

    clips: Int64Array
    offsets: Int64Array
    lengths: Int64Array
    costs: Int64Array
    capacity: int
    world: int

    @property
    def num_packs(self) -> int:
        return self.offsets.size - 1

    @property
    def num_steps(self) -> int:
        return self.num_packs // self.world

    @property
    def pack_of_clip(self) -> Int64Array:
        """Pack of each clip, -1 if it was dropped."""
        packs = np.full(self.lengths.size, -1, np.int64)
        packs[self.clips] = np.repeat(np.arange(self.num_packs), np.diff(self.offsets))
        return packs

    @property
    def pack_tokens(self) -> Int64Array:
        """Tokens of each pack, `[P]`."""
        return sums(self.lengths[self.clips], self.offsets)

    @property
    def pack_costs(self) -> Int64Array:
        """Cost of each pack, `[P]`."""
        return sums(self.costs[self.clips], self.offsets)

    @property
    def fill(self) -> float:
        """Tokens over the tokens that all packs could hold."""
        return float(self.pack_tokens.sum() / max(self.num_packs * self.capacity, 1))

    @property
    def lower_bound(self) -> int:
        """No plan of the packed clips has fewer packs; see `lower_bound`."""
        return lower_bound(self.lengths[self.clips], self.capacity, self.world)

    @property
    def balance(self) -> float:
        """Cost of the busiest rank over the mean of the ranks, for the whole epoch."""
        ranks = self.pack_costs.reshape(-1, self.world).sum(axis=0)
        return float(ranks.max() / ranks.mean()) if ranks.any() else 1.0

    @property
    def step_balance(self) -> float:
        """The same when the ranks wait for each other at every step: sum of maxima over mean."""
        steps = self.pack_costs.reshape(-1, self.world)
        return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum()) if steps.size else 1.0

    def pack(self, step: int, rank: int) -> Int64Array:
        """Clip numbers that `rank` takes at `step`."""
        if not (0 <= step < self.num_steps and 0 <= rank < self.world):
            raise ValueError(
                f"step, rank: expected less than {self.num_steps} and {self.world}, got "
                f"{step} and {rank}"
            )
        i = step * self.world + rank
        return self.clips[self.offsets[i] : self.offsets[i + 1]]


def plan(
    lengths: npt.ArrayLike,
    capacity: int,
    *,
    cost: Cost | None = None,
    seed: int = 0,
    epoch: int = 0,
    world: int = 1,
    window: int | None = None,
    drop_last: bool = False,
    implementation: Implementation | None = None,
) -> Plan:
    """Packs clips of `lengths` tokens into packs of at most `capacity`, the same number per rank.

    Args:
        lengths: integers `[n]`, tokens of each clip, each in [1, capacity].
        capacity: token budget of a pack.
        cost: what the ranks balance; None = `Cost()`.
        seed, epoch: the order of the clips and of the steps; any integers.
        world: ranks.
        window: packs that are packed and shuffled together, at least 2 * world; None = the larger
            of 256 and 32 * world.
        drop_last: leave out the packs that do not fill a last step, instead of splitting packs.
        implementation: "native" (C++) or "numpy"; None = the first that is there.

    Raises:
        ValueError: a clip does not fit (its index and length are named), an argument is out of
            range, or the last step cannot be filled because every pack holds a single clip.
        RuntimeError: "native" is asked for and not built.
    """
    lengths = check_lengths(lengths, capacity)
    stream = PackStream(
        capacity,
        cost=cost,
        seed=seed,
        epoch=epoch,
        world=world,
        window=window,
        drop_last=drop_last,
        implementation=implementation,
    )
    costs = stream.cost.of(lengths)
    shuffle = np.argsort(keys(seed, epoch, 0, lengths.size), kind="stable")
    stream.push(lengths[shuffle])
    packs = stream.rest()
    clips = shuffle[np.concatenate([p.clips for p in packs])]
    offsets = offsets_of(np.concatenate([p.counts for p in packs]))
    return Plan(clips, offsets, lengths, costs, stream.capacity, stream.world)
