"""How a time is taken: providers in turn, round after round, and intervals that assume nothing.

Machines drift: another process wakes up, a clock changes. Timing A a hundred times and then B a
hundred times puts that drift into their ratio. So one round times every provider once
(A B C, A B C, ...), the ratio is taken inside each round, and what is reported is the median of
those ratios with an exact, distribution-free interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from .turns import turn

Run = Callable[[], object]

MIN_ROUNDS = 7  # the fewest for which [2nd smallest, 2nd largest] or the extremes cover 95%
MAX_ROUNDS = 50
SHORTEST_ROUND = 1e-3  # seconds; a shorter call is repeated inside its round
MAX_LOOPS = 500
LONG_ROUND = 2.0  # seconds; after a round this long there is nothing left to warm
MOST_LEAD = 2e-3  # seconds of enqueueing that are hidden behind other work of the GPU


class Driver(Protocol):
    """Times ``rounds`` calls of ``target(*setup())`` and returns the seconds of each.

    ``setup`` runs before every call, outside the clock. `clock_driver` is the built-in one;
    ``benchmark.pedantic`` of pytest-benchmark fits behind the same signature.
    """

    def __call__(
        self, target: Callable[..., None], setup: Callable[[], tuple[Run, int]], rounds: int
    ) -> Sequence[float]: ...


def clock_driver(
    target: Callable[..., None], setup: Callable[[], tuple[Run, int]], rounds: int
) -> list[float]:
    """Times with ``time.perf_counter``; each call is a turn where two processes take turns."""
    seconds = []
    for _ in range(rounds):
        arguments = setup()
        with turn():
            start = perf_counter()
            target(*arguments)
            seconds.append(perf_counter() - start)
    return seconds


def _repeat(run: Run, loops: int) -> None:
    for _ in range(loops):
        run()


def measure(
    runs: Mapping[str, Run],
    *,
    seconds: float = 2.0,
    drive: Driver = clock_driver,
    warmup: int = 2,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, list[float]]:
    """Times CPU callables against each other.

    Args:
        runs: name -> call without arguments. One round calls each once, in this order.
        seconds: how long to measure, about; the round count follows from it.
        drive: who holds the clock.
        warmup: untimed rounds first. They also fault in the pages that the allocator keeps.

    Returns:
        name -> milliseconds per call, one per round; entry ``i`` of all names is the same round.
    """
    if not runs:
        raise ValueError("runs must name at least one callable, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    names = list(runs)
    costs = dict.fromkeys(names, math.inf)
    for lap in range(max(1, warmup)):
        if lap and sum(costs.values()) > LONG_ROUND:
            break
        for name in names:
            start = perf_counter()
            runs[name]()
            costs[name] = min(costs[name], perf_counter() - start)
    loops = min(MAX_LOOPS, max(1, math.ceil(SHORTEST_ROUND / max(min(costs.values()), 1e-9))))
    round_cost = loops * sum(costs.values())
    rounds = min(max_rounds, max(min_rounds, int(seconds / max(round_cost, 1e-9))))
    turns = cycle(names)
    times = drive(_repeat, lambda: (runs[next(turns)], loops), rounds * len(names))
    if len(times) != rounds * len(names):
        raise RuntimeError(f"the driver returned {len(times)} times for {rounds * len(names)}")
    return {
        name: [t / loops * 1e3 for t in times[position :: len(names)]]
        for position, name in enumerate(names)
    }


def measure_cuda(
    runs: Mapping[str, Run],
    *,
    seconds: float = 1.0,
    warmup: int = 3,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, list[float]]:
    """Times CUDA callables against each other: events, and a cold L2 before every call.

    A buffer of twice the L2 is overwritten before each timed call, as often as it takes the host
    to enqueue the call (up to ``MOST_LEAD``): the GPU is still busy with that when the call's
    kernels arrive, so a short kernel is not timed as the Python that launches it. Clocks and power
    limits are left as found. Arguments and result as for `measure`.
    """
    if not runs:
        raise ValueError("runs must name at least one callable, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    with turn():
        return _measure_cuda(runs, seconds, warmup, min_rounds, max_rounds)


def _measure_cuda(
    runs: Mapping[str, Run], seconds: float, warmup: int, min_rounds: int, max_rounds: int
) -> dict[str, list[float]]:
    device = torch.cuda.current_device()
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * max(l2_bytes, 1 << 26), dtype=torch.int8, device="cuda")

    def timed(run: Run, flushes: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for _ in range(flushes):
            flush.zero_()
        begin.record()
        run()
        end.record()
        return begin, end

    begin, end = timed(lambda: [flush.zero_() for _ in range(8)], 8)
    torch.cuda.synchronize()
    flush_ms = begin.elapsed_time(end) / 8
    enqueue, whole = dict.fromkeys(runs, math.inf), dict.fromkeys(runs, math.inf)
    for lap in range(max(2, warmup)):
        if lap > 1 and sum(whole.values()) > LONG_ROUND:
            break
        for name, run in runs.items():
            start = perf_counter()
            run()
            enqueue[name] = min(enqueue[name], perf_counter() - start)
            torch.cuda.synchronize()
            whole[name] = min(whole[name], perf_counter() - start)
    leads = {
        name: max(1, math.ceil(1.5e3 * min(cost, MOST_LEAD) / max(flush_ms, 1e-3)))
        for name, cost in enqueue.items()
    }
    cost = sum(whole.values()) + 1e-3 * flush_ms * sum(leads.values())
    rounds = min(max_rounds, max(min_rounds, int(seconds / max(cost, 1e-9))))
    recorded = [{n: timed(run, leads[n]) for n, run in runs.items()} for _ in range(rounds)]
    torch.cuda.synchronize()
    return {
        name: [begin.elapsed_time(end) for begin, end in (r[name] for r in recorded)]
        for name in runs
    }


@dataclass(frozen=True)
class Interval:
    """A median and its confidence interval."""

    median: float
    low: float
    high: float
    confidence: float
    rounds: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of ``values`` and the interval between two order statistics that covers it.

    The number of observations under the true median is Binomial(n, 1/2), whatever they are
    distributed like, so ``[x_(k+1), x_(n-k)]`` covers it with probability
    ``1 - 2 P(Binomial(n, 1/2) <= k)``: the inverted sign test. ``k`` is the largest that keeps
    ``confidence``; with fewer than six values the extremes are taken and the interval says the
    confidence that it really has.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one time, got none")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    ordered = sorted(values)
    k, tail = 0, 0.5**n
    while k + 1 <= (n - 1) // 2:
        wider = tail + math.comb(n, k + 1) * 0.5**n
        if 1 - 2 * wider < confidence:
            break
        k, tail = k + 1, wider
    return Interval(median(ordered), ordered[k], ordered[n - 1 - k], max(0.0, 1 - 2 * tail), n)


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95
) -> Interval:
    """The median over rounds of ``numerator / denominator``, with its interval."""
    if len(numerator) != len(denominator):
        raise ValueError(
            f"paired samples must have one value per round each, "
            f"got {len(numerator)} and {len(denominator)}"
        )
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return median_interval(ratios, confidence)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
