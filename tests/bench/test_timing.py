"""Rounds alternate, loops divide out, and intervals cover what they say."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from sora_kernels.bench import clock_driver, measure, median_interval, paired_ratio
from sora_kernels.bench.timing import MIN_ROUNDS, SHORTEST_ROUND, Run, quantile


def test_providers_alternate_and_every_round_is_kept() -> None:
    order: list[str] = []
    seen_at_start: list[int] = []

    def drive(target: Callable[..., None], setup: Callable[[], tuple[Run, int]], rounds: int):  # type: ignore[no-untyped-def]
        seen_at_start.append(len(order))
        return [float(i) for i, _ in enumerate(clock_driver(target, setup, rounds))]

    def slow(name: str) -> Run:
        def run() -> None:
            order.append(name)
            total = 0
            for i in range(60_000):  # over SHORTEST_ROUND: one loop per round
                total += i

        return run

    samples = measure({"a": slow("a"), "b": slow("b"), "c": slow("c")}, seconds=0, drive=drive)
    timed = order[seen_at_start[0] :]
    assert timed == ["a", "b", "c"] * MIN_ROUNDS
    # The driver numbered the rounds in order; each provider must get back its own.
    assert samples["a"] == [3e3 * i for i in range(MIN_ROUNDS)]
    assert samples["c"] == [3e3 * i + 2e3 for i in range(MIN_ROUNDS)]


def test_short_calls_are_repeated_and_divided() -> None:
    calls = 0
    loops_seen: set[int] = set()

    def run() -> None:
        nonlocal calls
        calls += 1

    def drive(
        target: Callable[..., None], setup: Callable[[], tuple[Run, int]], rounds: int
    ) -> Sequence[float]:
        for _ in range(rounds):
            function, loops = setup()
            loops_seen.add(loops)
            target(function, loops)
        return [1.0] * rounds

    samples = measure({"a": run}, seconds=0, drive=drive, warmup=2)
    (loops,) = loops_seen
    assert loops > 1
    assert calls == 2 + MIN_ROUNDS * loops
    assert samples["a"] == [1e3 / loops] * MIN_ROUNDS
    assert SHORTEST_ROUND > 0


def test_a_driver_that_loses_rounds_is_refused() -> None:
    with pytest.raises(RuntimeError, match="returned 3 times for 7"):
        measure({"a": lambda: None}, seconds=0, drive=lambda t, s, r: [1.0] * 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="runs"):
        measure({})
    with pytest.raises(ValueError, match="min_rounds"):
        measure({"a": lambda: None}, min_rounds=3, max_rounds=2)
    with pytest.raises(ValueError, match="values"):
        median_interval([])
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def test_paired_ratio_ignores_drift() -> None:
    drift = [1.0, 1.3, 2.0, 4.0, 1.1, 3.0, 1.0, 5.0, 2.5]
    ours = [1.0 * d for d in drift]
    theirs = [1.5 * d for d in drift]
    interval = paired_ratio(theirs, ours)
    assert interval.median == pytest.approx(1.5)
    assert interval.low == pytest.approx(1.5)
    assert interval.high == pytest.approx(1.5)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 50])
def test_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    generator = random.Random(n)
    trials = 2000
    covered = 0
    for _ in range(trials):
        interval = median_interval([generator.expovariate(1.0) for _ in range(n)])
        covered += interval.low <= 0.693147 <= interval.high
    # Three standard deviations of a proportion over 2000 trials are at most 0.034.
    assert covered / trials == pytest.approx(interval.confidence, abs=0.034)
    assert interval.confidence >= 0.95 or n < 6
    assert interval.rounds == n


def test_quantile_interpolates() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert quantile([7.0], 0.8) == 7.0
