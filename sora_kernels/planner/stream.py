"""Planning clip lengths as they arrive, window by window."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Int64Array, check_int, check_lengths, keys
from .bins import Implementation, best_fit, choose_native
from .cost import Cost

# One in this many packs of a window (the least filled) is taken apart; its clips wait.
_CARRY = 16


@dataclass(frozen=True)
class _Clips:
    """Clips that wait: number of arrival, length, and how many windows they have waited for."""

    ids: Int64Array
    lengths: Int64Array
    ages: Int64Array

    def cut(self, where: Any) -> _Clips:
        return _Clips(self.ids[where], self.lengths[where], self.ages[where])

    @staticmethod
    def join(*parts: _Clips) -> _Clips:
        names = ("ids", "lengths", "ages")
        return _Clips(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))

    @staticmethod
    def none() -> _Clips:
        return _Clips(*(np.zeros(0, np.int64) for _ in range(3)))


@dataclass(frozen=True)
class Packs:
    """Consecutive packs of a plan: clip numbers and the clips in each pack."""

    clips: Int64Array
    counts: Int64Array

    def steps(self, world: int) -> Iterator[list[Int64Array]]:
        packs = np.split(self.clips, np.cumsum(self.counts[:-1])) if self.counts.size else []
        for i in range(0, len(packs), world):
            yield packs[i : i + world]


class PackStream:
    """Plans a stream whose clip lengths arrive in chunks; how they are cut does not matter.

    Clips are numbered in the order of arrival and packed in that order, window by window (shuffle
    before, or let the shuffle window do it). Steps are ready once two windows of clips are there.

        stream = PackStream(capacity=32768, world=8)
        for lengths in chunks:
            stream.push(lengths)
            for step in stream.take():      # a list of `world` arrays of clip numbers
                ...
        for step in stream.finish(): ...

    Args and errors: as `plan`.
    """

    def __init__(
        self,
        capacity: int,
        *,
        cost: Cost | None = None,
        seed: int = 0,
        epoch: int = 0,
        world: int = 1,
        window: int | None = None,
        drop_last: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        self.capacity = check_int("capacity", capacity, 1)
        self.world = check_int("world", world, 1)
        default = max(256, 32 * self.world)
        # At least two steps: one is planned while the least filled packs wait for the next.
        self.window = check_int("window", default if window is None else window, 2 * self.world)
        self.cost = Cost() if cost is None else cost
        self.seed, self.epoch = int(seed), int(epoch)
        self.drop_last = drop_last
        self._native = choose_native(implementation)
        self._carried, self._new = _Clips.none(), _Clips.none()
        self._arriving: list[_Clips] = []
        self._tokens = 0
        self._arrived = 0
        self._windows = 0
        self._loads = [0] * self.world

    def push(self, lengths: npt.ArrayLike) -> None:
        """Adds clips of these lengths."""
        lengths = check_lengths(lengths, self.capacity, self._arrived)
        ids = np.arange(self._arrived, self._arrived + lengths.size)
        self._arriving.append(_Clips(ids, lengths, np.zeros_like(ids)))
        self._arrived += lengths.size
        self._tokens += int(lengths.sum())

    def take(self) -> list[list[Int64Array]]:
        """The steps that are ready, each a list of `world` arrays of clip numbers."""
        return [step for packs in self._ready() for step in packs.steps(self.world)]

    def finish(self) -> list[list[Int64Array]]:
        """The remaining steps; the stream is empty after it.

        Raises:
            ValueError: the last step cannot be filled (see `plan`).
        """
        return [step for packs in self.rest() for step in packs.steps(self.world)]

    def _ready(self) -> list[Packs]:
        """Plans whole windows while two of them are there, so that the last one is never short."""
        size = self.window * self.capacity
        planned: list[Packs] = []
        if self._tokens < 2 * size:
            return planned
        self._gather()
        total = np.cumsum(self._new.lengths)
        start = 0
        while self._tokens >= 2 * size:
            before = int(total[start - 1]) if start else 0
            wanted = size - int(self._carried.lengths.sum())
            stop = int(np.searchsorted(total, before + wanted)) + 1
            chosen = _Clips.join(self._carried, self._new.cut(slice(start, max(start, stop))))
            start = max(start, stop)
            packs, self._carried = self._plan_window(chosen, last=False)
            self._tokens = int(total[-1] - total[start - 1] + self._carried.lengths.sum())
            planned.append(packs)
        self._new = self._new.cut(slice(start, None))
        return planned

    def rest(self) -> list[Packs]:
        """`finish`, with the packs of each window in one array."""
        planned = self._ready()
        self._gather()
        packs, _ = self._plan_window(_Clips.join(self._carried, self._new), last=True)
        self._carried = self._new = _Clips.none()
        self._tokens = 0
        return [*planned, packs]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed stream needs: arrays and integers. `take` first."""
        self._gather()
        waiting = _Clips.join(self._carried, self._new)
        return {
            "config": self._config(),
            "ids": waiting.ids,
            "lengths": waiting.lengths,
            "carried": self._carried.ids.size,
            "ages": waiting.ages,
            "loads": list(self._loads),
            "arrived": self._arrived,
            "windows": self._windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was called; push the clips from number `arrived` on.

        Raises:
            ValueError: the state comes from other arguments.
        """
        if state["config"] != self._config():
            raise ValueError(f"state: expected {self._config()}, got {state['config']}")
        waiting = _Clips(*(np.array(state[name], np.int64) for name in ("ids", "lengths", "ages")))
        self._carried = waiting.cut(slice(state["carried"]))
        self._new, self._arriving = waiting.cut(slice(state["carried"], None)), []
        self._loads = [int(load) for load in state["loads"]]
        self._tokens = int(waiting.lengths.sum())
        self._arrived, self._windows = int(state["arrived"]), int(state["windows"])

    def _config(self) -> dict[str, Any]:
        names = ("capacity", "world", "window", "seed", "epoch", "drop_last")
        cost = (self.cost.linear, self.cost.pair, self.cost.max_keys or 0)
        return {name: getattr(self, name) for name in names} | {"cost": list(cost)}

    def _gather(self) -> None:
        self._new = _Clips.join(self._new, *self._arriving)
        self._arriving = []

    def _plan_window(self, clips: _Clips, last: bool) -> tuple[Packs, _Clips]:
        """The packs of one window, step after step, and the clips that wait for the next."""
        clips = clips.cut(np.argsort(-clips.lengths, kind="stable"))
        bins = best_fit(clips.lengths, self.capacity, self._native)
        costs = self.cost.of(clips.lengths)
        if last:
            bins = self._complete_last_step(bins, clips.lengths, costs)
            emitted: Int64Array = np.arange(int(bins.max(initial=-1)) + 1)
        else:
            emitted = self._choose_packs(bins, clips)
        # One entry too many, so that bin -1 (dropped) has a place: nowhere.
        cost_of_bin = np.zeros(int(bins.max(initial=-1)) + 2, np.int64)
        np.add.at(cost_of_bin, bins, costs)
        # Packs of similar cost share a step; steps come in random order.
        by_cost = emitted[np.argsort(-cost_of_bin[emitted], kind="stable")]
        steps: Int64Array = by_cost.reshape(-1, self.world)
        self._windows += 1
        order = keys(self.seed, self.epoch, self._windows, len(steps))
        steps = steps[np.argsort(order, kind="stable")]
        place = np.full(cost_of_bin.size, -1, np.int64)
        place[steps.ravel()] = self._ranks(cost_of_bin[steps])
        place_of_clip = place[bins]
        by_place = np.argsort(place_of_clip, kind="stable")
        waiting = int(np.searchsorted(place_of_clip[by_place], 0))
        counts = np.bincount(place_of_clip[by_place[waiting:]], minlength=steps.size)
        carried = clips.cut(place_of_clip < 0)
        older = _Clips(carried.ids, carried.lengths, carried.ages + 1)
        return Packs(clips.ids[by_place[waiting:]], counts), older

    def _ranks(self, costs: Int64Array) -> Int64Array:
        """`step * world + rank` of each pack, given costs `[steps, world]`, decreasing in a step.

        The costliest pack of a step goes to the rank with the least work so far.
        """
        if self.world == 1:
            return np.arange(costs.size)
        places: list[int] = []
        loads, ranks = self._loads, range(self.world)
        for first, row in zip(itertools.count(0, self.world), costs.tolist()):
            for rank, cost in zip(sorted(ranks, key=loads.__getitem__), row, strict=True):
                loads[rank] += cost
                places.append(first + rank)
        return np.asarray(places, np.int64)

    def _choose_packs(self, bins: Int64Array, clips: _Clips) -> Int64Array:
        """The packs to emit now: those with clips that waited before, then the fullest."""
        count = int(bins.max()) + 1
        tokens, age = np.zeros(count, np.int64), np.zeros(count, np.int64)
        np.add.at(tokens, bins, clips.lengths)
        np.maximum.at(age, bins, clips.ages)
        keep = (count - max(1, count // _CARRY)) // self.world * self.world
        return np.lexsort((np.arange(count), -tokens, -age))[:keep]

    def _complete_last_step(
        self, bins: Int64Array, lengths: Int64Array, costs: Int64Array
    ) -> Int64Array:
        """Makes the number of packs a multiple of `world`: splits the costliest, or drops (-1)."""
        count = int(bins.max(initial=-1)) + 1
        missing = -count % self.world
        if missing == 0:
            return bins
        if self.drop_last:
            tokens = np.zeros(count, np.int64)
            np.add.at(tokens, bins, lengths)
            by_fill = np.argsort(-tokens, kind="stable")
            keep = count // self.world * self.world
            renamed = np.full(count, -1, np.int64)
            renamed[by_fill[:keep]] = np.arange(keep)
            return renamed[bins]
        bins = bins.copy()
        for new in range(count, count + missing):
            members = np.bincount(bins, minlength=new)
            total = np.zeros(new, np.int64)
            np.add.at(total, bins, costs)
            total[members < 2] = -1
            split = int(total.argmax())
            if total[split] < 0:
                raise ValueError(
                    f"world: expected clips for a last step of {self.world} packs, but its {new} "
                    "packs hold one clip each; use drop_last=True or fewer ranks"
                )
            halves = [0, 0]
            for clip in np.flatnonzero(bins == split):
                lighter = int(halves[1] < halves[0])
                halves[lighter] += int(costs[clip])
                if lighter:
                    bins[clip] = new
        return bins


def pack_stream(
    chunks: Iterable[npt.ArrayLike],
    capacity: int,
    *,
    rank: int = 0,
    start_step: int = 0,
    **options: Any,
) -> Iterator[Int64Array]:
    """The packs of one rank from chunks of clip lengths, as clip numbers in order of arrival.

    Args:
        chunks: arrays of lengths; how the stream is cut into chunks does not matter.
        start_step: skips the steps before it, to resume.
        options: those of `PackStream`.
    """
    stream = PackStream(capacity, **options)
    if not 0 <= rank < stream.world:
        raise ValueError(f"rank: expected less than world ({stream.world}), got {rank}")
    step = 0
    for packs in _all_steps(stream, chunks):
        if step >= start_step:
            yield packs[rank]
        step += 1


def _all_steps(stream: PackStream, chunks: Iterable[npt.ArrayLike]) -> Iterator[list[Int64Array]]:
    for lengths in chunks:
        stream.push(lengths)
        yield from stream.take()
    yield from stream.finish()
