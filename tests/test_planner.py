"""The packing planner: every clip once, within budget, balanced, near the bound, reproducible."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_kernels import _ext
from sora_kernels.planner import (
    Cost,
    PackSampler,
    PackStream,
    lower_bound,
    pack_stream,
    plan,
)
from sora_kernels.planner.arrays import keys

BUDGET = 32_768
IMPLEMENTATIONS = ["numpy"] + (["native"] if _ext.host is not None else [])
quick = settings(max_examples=40, deadline=None)
clip_lists = st.lists(st.integers(1, 100), min_size=1, max_size=200)


def video_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of clips with few and many frames at all sizes and aspect ratios."""
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 2, 5, 9, 13, 21], count)
    tokens = frames * rng.integers(12, 40, count) * rng.integers(12, 40, count)
    return tokens.clip(1, BUDGET)


DISTRIBUTIONS = {
    "videos": video_lengths(20_000),
    "lognormal": np.random.default_rng(1).lognormal(7.5, 1.0, 20_000).clip(16, BUDGET).astype(int),
    "buckets": np.random.default_rng(2).choice([1560, 1024, 256, 4096, 8190, 6240], 20_000),
    "uniform": np.random.default_rng(3).integers(1, BUDGET + 1, 20_000),
    "more than half": np.random.default_rng(4).integers(18_000, 21_300, 4096),
}


@quick
@given(clip_lists, st.integers(1, 4), st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_every_clip_once_and_no_pack_over_budget(lengths, world, seed, window, drop_last):
    window *= 2 * world
    try:
        p = plan(lengths, 100, world=world, seed=seed, window=window, drop_last=drop_last)
    except ValueError as error:
        # Only when single clips cannot fill the last step; then dropping is the answer.
        assert "last step" in str(error) and not drop_last
        p = plan(lengths, 100, world=world, seed=seed, window=window, drop_last=True)
        drop_last = True
    assert p.num_packs % world == 0
    assert (np.diff(p.offsets) >= 1).all() and p.offsets[-1] == p.clips.size
    assert len(set(p.clips.tolist())) == p.clips.size
    dropped = len(lengths) - p.clips.size
    assert dropped == 0 or drop_last
    assert dropped == np.count_nonzero(p.pack_of_clip < 0)
    tokens = [
        sum(lengths[c] for c in p.pack(step, rank))
        for step in range(p.num_steps)
        for rank in range(world)
    ]
    assert tokens == p.pack_tokens.tolist() and all(0 < n <= 100 for n in tokens)
    assert p.num_packs >= p.lower_bound


@pytest.mark.parametrize("world", [1, 8, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_near_the_bound_and_balanced(name, world):
    p = plan(DISTRIBUTIONS[name], BUDGET, world=world, seed=3)
    assert sorted(p.clips.tolist()) == list(range(DISTRIBUTIONS[name].size))
    assert p.num_packs <= 1.03 * p.lower_bound
    assert p.balance <= 1.05
    assert p.step_balance <= 1.05


def test_balance_counts_attention_within_its_window():
    lengths = video_lengths(4000)
    full, windowed = Cost.of_width(384), Cost.of_width(384, max_keys=2000)
    assert windowed.of(np.array([500, 8000])).tolist() == [500 * 2804, 8000 * 4304]
    assert full.of(np.array([500, 8000])).tolist() == [500 * 2804, 8000 * 10304]
    for cost in (full, windowed, Cost(linear=1, pair=0)):
        p = plan(lengths, BUDGET, world=8, cost=cost)
        assert p.pack_costs.sum() == cost.of(lengths).sum()
        assert p.balance <= 1.05 and p.step_balance <= 1.05


def best_number_of_packs(lengths: list[int], capacity: int) -> int:
    """By exhaustive search."""
    best = len(lengths)

    def place(i: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for j, room in enumerate(rooms):
            if room >= lengths[i]:
                place(i + 1, [*rooms[:j], room - lengths[i], *rooms[j + 1 :]])
        place(i + 1, [*rooms, capacity - lengths[i]])

    place(0, [])
    return best


def l2_by_definition(lengths: list[int], capacity: int) -> int:
    best = -(-sum(lengths) // capacity)
    for p in range(capacity // 2 + 1):
        alone = [n for n in lengths if n > capacity - p]
        large = [n for n in lengths if capacity / 2 < n <= capacity - p]
        small = [n for n in lengths if p <= n <= capacity / 2]
        rest = sum(small) - (len(large) * capacity - sum(large))
        best = max(best, len(alone) + len(large) + max(0, -(-rest // capacity)))
    return best


@quick
@given(st.lists(st.integers(1, 20), max_size=8), st.integers(20, 30))
def test_lower_bound_is_the_formula_and_a_bound(lengths, capacity):
    bound = lower_bound(lengths, capacity)
    assert bound == l2_by_definition(lengths, capacity)
    assert bound <= best_number_of_packs(sorted(lengths, reverse=True), capacity)
    assert lower_bound(lengths, capacity, world=4) == -(-bound // 4) * 4


def test_packs_are_not_sorted_and_the_shuffle_is_bounded():
    lengths = np.sort(video_lengths(20_000))
    p = plan(lengths, BUDGET, seed=1)
    longest = np.maximum.reduceat(lengths[p.clips], p.offsets[:-1]).astype(float)
    order = np.arange(longest.size)
    assert abs(np.corrcoef(order, longest)[0, 1]) < 0.1
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.1
    # In a stream, a clip is packed within its window or one of the next two.
    window = 32
    stream = PackStream(BUDGET, window=window)
    lengths = video_lengths(20_000)
    stream.push(lengths)
    clips = np.concatenate([pack for step in stream.finish() for pack in step])
    assert sorted(clips.tolist()) == list(range(20_000))
    # Where each clip lies in the stream and in the plan, in tokens.
    arrived, packed = np.cumsum(lengths), np.empty(20_000)
    packed[clips] = np.cumsum(lengths[clips])
    assert np.abs(packed - arrived).max() <= 3 * window * BUDGET


def test_a_pure_function_of_seed_epoch_and_world():
    lengths = video_lengths(3000)
    first = plan(lengths, BUDGET, seed=1, epoch=2, world=4)
    again = plan(lengths.copy(), BUDGET, seed=1, epoch=2, world=4)
    assert np.array_equal(first.clips, again.clips)
    assert np.array_equal(first.offsets, again.offsets)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(first.clips, plan(lengths, BUDGET, world=4, **other).clips)
    # Pinned: a changed order would silently change every resumed run.
    assert keys(0, 0, 0, 3).tolist() == [
        2391539541053276776,
        920862675595841680,
        12365375887819322540,
    ]
    assert plan([5, 3, 8, 2, 7, 4], 10, seed=1, world=2).clips.tolist() == [2, 3, 0, 5, 4, 1]


@pytest.mark.skipif(_ext.host is None, reason=f"no host module: {_ext.missing.get('_host')}")
@quick
@given(clip_lists, st.integers(100, 130), st.integers(1, 3), st.integers(0, 9))
def test_native_and_numpy_plan_alike(lengths, capacity, world, seed):
    plans = [
        plan(lengths, capacity, world=world, seed=seed, window=6, drop_last=True, implementation=i)
        for i in ("native", "numpy")
    ]
    assert np.array_equal(plans[0].clips, plans[1].clips)
    assert np.array_equal(plans[0].offsets, plans[1].offsets)


@pytest.mark.skipif(_ext.host is None, reason=f"no host module: {_ext.missing.get('_host')}")
def test_host_module():
    info = _ext.host.build_info()
    assert info["cpp_standard"] >= 201703 and info["compiler"]
    lengths = np.array([5, 5, 3, 7], np.int64)
    assert _ext.host.best_fit(lengths, 10).tolist() == [0, 0, 1, 1]
    assert _ext.host.best_fit(lengths[:0], 10).tolist() == []
    with pytest.raises(ValueError, match=r"lengths\[3\]: expected 1 to 6, got 7"):
        _ext.host.best_fit(lengths, 6)
    with pytest.raises(ValueError, match="expected one dimension, got 2"):
        _ext.host.best_fit(lengths[None], 10)
    with pytest.raises(TypeError):
        _ext.host.best_fit(lengths.astype(np.int32), 10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_at_size(implementation):
    lengths = DISTRIBUTIONS["lognormal"]
    p = plan(lengths, BUDGET, world=4, implementation=implementation)
    q = plan(lengths, BUDGET, world=4)
    assert np.array_equal(p.clips, q.clips)


@pytest.mark.parametrize("stop", [0, 1, 7, 29])
def test_sampler_resumes_to_the_same_packs(stop):
    lengths = video_lengths(1500)

    def make(rank: int) -> PackSampler:
        return PackSampler(lengths, BUDGET, rank=rank, world=4, seed=5)

    whole = [list(make(rank)) for rank in range(4)]
    assert {len(packs) for packs in whole} == {len(make(0))} and len(make(0)) > 30
    assert sorted(sum((sum(packs, []) for packs in whole), [])) == list(range(1500))
    for rank in range(4):
        begun = make(rank)
        seen = list(itertools.islice(begun, stop))
        resumed = make(rank)
        resumed.load_state_dict(begun.state_dict())
        assert seen + list(resumed) == whole[rank]


def test_sampler_epochs():
    lengths = video_lengths(600)
    sampler = PackSampler(lengths, BUDGET, world=2)
    first, second = list(sampler), list(sampler)
    assert first != second and sampler.epoch == 2
    sampler.set_epoch(0)
    next(iter(sampler))
    sampler.set_epoch(0)  # goes on
    assert list(sampler) == first[1:]
    sampler.set_epoch(1)
    assert list(sampler) == second
    # Saved behind a prefetching loader; and at the end of an epoch.
    sampler.load_state_dict(PackSampler(lengths, BUDGET, world=2).state_dict(epoch=1, step=3))
    assert list(sampler) == second[3:]
    sampler.load_state_dict(sampler.state_dict(epoch=0, step=len(first)))
    assert list(sampler) == second


@pytest.mark.parametrize(
    "change",
    [{"world": 2}, {"seed": 1}, {"window": 9}, {"cost": Cost(5)}, {"drop_last": True}],
    ids=str,
)
def test_sampler_refuses_a_foreign_state(change):
    lengths = video_lengths(50)
    state = PackSampler(lengths, BUDGET).state_dict()
    PackSampler(lengths.copy(), BUDGET).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected one of the same lengths"):
        PackSampler(lengths, BUDGET, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected one of the same lengths"):
        PackSampler(np.roll(lengths, 1), BUDGET).load_state_dict(state)


def chunked(lengths: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(lengths, sorted(cuts))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 1500), max_size=12), st.integers(1, 3))
def test_stream_does_not_depend_on_the_chunks(cuts, world):
    lengths = video_lengths(1500)
    options = {"world": world, "window": 8, "seed": 2}
    whole = list(pack_stream([lengths], BUDGET, **options))
    parts = list(pack_stream(chunked(lengths, cuts), BUDGET, **options))
    assert [p.tolist() for p in whole] == [p.tolist() for p in parts]
    skipped = list(pack_stream([lengths], BUDGET, start_step=11, **options))
    assert [p.tolist() for p in skipped] == [p.tolist() for p in whole[11:]]


def test_stream_state_resumes():
    lengths = video_lengths(3000)

    def make() -> PackStream:
        return PackStream(BUDGET, world=3, window=8)

    def run(stream: PackStream, chunks: list[np.ndarray]) -> list[list[int]]:
        packs = []
        for chunk in chunks:
            stream.push(chunk)
            packs += [pack.tolist() for step in stream.take() for pack in step]
        return packs

    whole = make()
    expected = run(whole, [lengths])
    assert len(expected) > 100
    expected += [pack.tolist() for step in whole.finish() for pack in step]
    begun = make()
    packs = run(begun, [lengths[:1700]])
    state = begun.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert state["arrived"] == 1700
    packs += run(resumed, [lengths[1700:2100], lengths[2100:]])
    packs += [pack.tolist() for step in resumed.finish() for pack in step]
    assert packs == expected
    assert sorted(sum(packs, [])) == list(range(3000))
    with pytest.raises(ValueError, match="state: expected {.*}, got"):
        PackStream(BUDGET, world=4, window=8).load_state_dict(state)


def test_empty_and_tiny_inputs():
    empty = plan([], 10, world=2)
    assert (empty.num_packs, empty.num_steps, empty.clips.size) == (0, 0, 0)
    assert (empty.balance, empty.step_balance, empty.fill) == (1.0, 1.0, 0.0)
    single = plan([10], 10)
    assert single.clips.tolist() == [0] and single.pack(0, 0).tolist() == [0]
    split = plan([1, 1, 1, 1], 10, world=4)
    assert np.diff(split.offsets).tolist() == [1, 1, 1, 1]
    dropped = plan([9, 9, 9], 10, world=2, drop_last=True)
    assert dropped.num_packs == 2 and np.count_nonzero(dropped.pack_of_clip < 0) == 1
    assert plan([9], 10, world=2, drop_last=True).num_packs == 0


BAD_INPUT = [
    (lambda: plan([5, 11], 10), "lengths[1]: expected 1 to 10 tokens (the capacity), got 11"),
    (lambda: plan([5, 0], 10), "lengths[1]: expected 1 to 10 tokens (the capacity), got 0"),
    (lambda: plan([5.0], 10), "lengths: expected integers [n], got float64 [1]"),
    (lambda: plan([[5]], 10), "lengths: expected integers [n], got int64 [1, 1]"),
    (lambda: plan([5], 0), "capacity: expected an integer >= 1, got 0"),
    (lambda: plan([5], 10.5), "capacity: expected an integer >= 1, got 10.5"),
    (lambda: plan([5], 10, world=0), "world: expected an integer >= 1, got 0"),
    (lambda: plan([5], 10, window=3, world=2), "window: expected an integer >= 4, got 3"),
    (
        lambda: plan([9, 9, 9], 10, world=2),
        "world: expected clips for a last step of 2 packs, but its 3 packs hold one clip each",
    ),
    (lambda: plan([5], 10, implementation="rust"), 'implementation: expected "native", "numpy"'),
    (lambda: plan([5], 10).pack(1, 0), "step, rank: expected less than 1 and 1, got 1 and 0"),
    (lambda: Cost(linear=0), "cost.linear: expected an integer >= 1, got 0"),
    (lambda: Cost(max_keys=0), "cost.max_keys: expected an integer >= 1, got 0"),
    (lambda: Cost().of(np.array([2**40])), "cost: expected a total below 2**62, got"),
    (lambda: PackSampler([5], 10, rank=2, world=2), "rank: expected less than world (2), got 2"),
    (lambda: list(pack_stream([[5], [11]], 10)), "lengths[1]: expected 1 to 10 tokens"),
    (lambda: list(pack_stream([[5]], 10, rank=1)), "rank: expected less than world (1), got 1"),
]


@pytest.mark.parametrize(("make", "message"), BAD_INPUT)
def test_bad_input_names_the_argument(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_native_that_is_not_built_is_an_error(monkeypatch):
    monkeypatch.setattr(_ext, "host", None)
    monkeypatch.setitem(_ext.missing, "_host", "not built")
    with pytest.raises(RuntimeError, match="native is not available: not built"):
        plan([5], 10, implementation="native")
    assert plan([5], 10).num_packs == 1
