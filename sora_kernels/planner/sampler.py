"""A resumable batch sampler over an epoch's plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import MASK, check_int, check_lengths, keys, mix
from .bins import Implementation
from .cost import Cost
from .epoch import Plan, plan


class PackSampler:
    """A batch sampler for one rank: yields lists of clip numbers, one pack per step.

    Give it to `torch.utils.data.DataLoader(batch_sampler=...)`. All ranks have the same number of
    steps. The order differs from epoch to epoch; an iterator that ends moves on to the next one.
    `state_dict` and `load_state_dict` resume in mid-epoch.

    Args:
        rank, world: this rank and the number of ranks.
        The others are those of `plan`.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        capacity: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        cost: Cost | None = None,
        window: int | None = None,
        drop_last: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        self.lengths = check_lengths(lengths, capacity)
        self.rank = check_int("rank", rank, 0)
        if rank >= check_int("world", world, 1):
            raise ValueError(f"rank: expected less than world ({world}), got {rank}")
        self._options: dict[str, Any] = {
            "world": world,
            "seed": seed,
            "cost": cost,
            "window": window,
            "drop_last": drop_last,
            "implementation": implementation,
        }
        self.capacity = capacity
        self.epoch = 0
        self.step = 0
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """The plan of the current epoch."""
        if self._plan is None:
            self._plan = plan(self.lengths, self.capacity, epoch=self.epoch, **self._options)
        return self._plan

    def set_epoch(self, epoch: int) -> None:
        """Starts `epoch` from its first step; if it is the current one, it goes on where it is."""
        if epoch != self.epoch:
            self.epoch, self.step, self._plan = epoch, 0, None

    def __len__(self) -> int:
        """Steps of the epoch, on every rank."""
        return self.plan.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch, plan = self.epoch, self.plan
        for step in range(self.step, plan.num_steps):
            self.step = step + 1
            yield plan.pack(step, self.rank).tolist()
        self.set_epoch(epoch + 1)

    def state_dict(self, epoch: int | None = None, step: int | None = None) -> dict[str, int]:
        """Where to go on.

        Args:
            epoch, step: what training has reached: `step` packs of `epoch` are done. None = what
                was yielded, which is ahead of training when a DataLoader prefetches.
        """
        epoch = self.epoch if epoch is None else check_int("epoch", epoch, 0)
        step = self.step if step is None else check_int("step", step, 0)
        return {"epoch": epoch, "step": step, "data": self._fingerprint()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after `step` packs of `epoch`.

        Raises:
            ValueError: the state belongs to other lengths, capacity, seed, ranks or options.
        """
        if state["data"] != self._fingerprint():
            raise ValueError(
                "state: expected one of the same lengths, capacity, seed, world, cost and window, "
                f"got fingerprint {state['data']} instead of {self._fingerprint()}"
            )
        self.set_epoch(state["epoch"])
        if state["step"] < len(self):
            self.step = state["step"]
        else:
            self.set_epoch(state["epoch"] + 1)

    def _fingerprint(self) -> int:
        cost = self._options["cost"] or Cost()
        numbers = [
            self.capacity,
            self._options["world"],
            self._options["seed"],
            self._options["window"] or 0,
            int(self._options["drop_last"]),
            cost.linear,
            cost.pair,
            cost.max_keys or 0,
        ]
        key = 0
        for number in numbers:
            key = mix(key ^ (number & MASK))
        weights = keys(key, 0, 0, self.lengths.size)
        return int((weights * self.lengths.astype(np.uint64)).sum(dtype=np.uint64) >> np.uint64(1))
