"""Metrics: values worked out by hand, floors that must fail, and clips that ask for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model import metrics
from model.grammar import SPEEDS, Wanted
from model.metrics import CHANGE, bounced, collided, mean, moved, occluded, pace, rate, seam, wrap
from model.oracle import ObjectReading

NAN = (np.nan, np.nan)
SLOW = SPEEDS["slowly"] * 100


def line(frames: int, velocity: tuple[float, float], start: tuple[float, float] = (10.0, 10.0)):
    steps = np.arange(frames, dtype=np.float64)[:, None]
    return np.array(start) + steps * np.array(velocity)


def read_as(points: np.ndarray, radius: float = 5.0, straight: bool = True) -> ObjectReading:
    places = tuple(None if np.isnan(x) else (float(x), float(y)) for x, y in points)
    return ObjectReading("red", "circle", "small", "left", "slowly", 0.9, 50.0, radius, places,
                         places, places, straight)  # fmt: skip


def test_wilson_against_known_values() -> None:
    low, high = metrics.wilson(45, 50)  # Newcombe 1998 gives such intervals to three digits
    assert low == pytest.approx(0.786, abs=2e-3) and high == pytest.approx(0.957, abs=2e-3)
    assert metrics.wilson(0, 10)[0] == 0 and metrics.wilson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="right"):
        metrics.wilson(3, 2)


def test_estimates_leave_out_what_was_not_asked() -> None:
    found = rate([True, None, False, True])
    assert found is not None and found.value == pytest.approx(2 / 3) and found.n == 3
    assert found.json()["low"] < 0.67 < found.json()["high"]
    assert rate([None, None]) is None and mean([None]) is None
    numbers = mean([1.0, None, 3.0])
    assert (
        numbers is not None and numbers.value == 2 and numbers.high == pytest.approx(3.96, abs=0.01)
    )


def test_motion_is_the_distance_along_the_prompt() -> None:
    want = Wanted(direction="right", speed="slowly")
    for factor, right in ((1.0, True), (0.72, True), (0.65, False), (1.28, True), (1.35, False)):
        assert moved(line(9, (factor * SLOW, 0)), want, 100) is right
    assert not moved(line(9, (-SLOW, 0)), want, 100)
    assert not moved(line(9, (0, SLOW)), want, 100)
    assert not moved(np.full((9, 2), 5.0), want, 100)
    assert not moved(np.full((9, 2), np.nan), want, 100)
    assert moved(line(9, (SPEEDS["quickly"] * 100, 0)), Wanted(direction="right"), 100)


def test_still_things_may_tremble_but_not_drift() -> None:
    want = Wanted(direction="still")
    tremble = np.full((9, 2), 5.0) + np.array([[0.3, 0.0], [-0.3, 0.0]] * 4 + [[0.3, 0.0]])
    assert moved(tremble, want, 32) and moved(tremble, want, 32, turns=True)
    assert not moved(line(9, (0.6, 0)), want, 32)


def test_the_way_counts_when_things_turn() -> None:
    there = line(5, (2, 0))
    way = np.concatenate([there, there[-2::-1]])
    assert pace(way, None) == pytest.approx(2) and pace(way, "right") == pytest.approx(0)
    assert moved(way, Wanted(direction="right"), 50, turns=True)


def test_seams_compare_with_the_clips_own_change() -> None:
    smooth = line(12, (2, 1))
    found = seam(smooth, 5, 32)
    assert found is not None and found.right
    assert found.position == pytest.approx(1) and found.velocity == pytest.approx(1)
    jump = smooth.copy()
    jump[5:] += (3, 1.5)
    assert seam(jump, 5, 32).position == pytest.approx(2.5) and not seam(jump, 5, 32).right  # type: ignore[union-attr]
    stuck = smooth.copy()
    stuck[5:] -= (2, 1)  # the known frame shown once more
    assert seam(stuck, 5, 32).position == pytest.approx(0)  # type: ignore[union-attr]
    stop = np.concatenate([smooth[:5], np.repeat(smooth[5:6], 7, 0)])
    assert seam(stop, 5, 32) is None or not seam(stop, 5, 32).right  # type: ignore[union-attr]
    turned = np.concatenate([smooth[:5], line(7, (-1, 2), tuple(smooth[4] + (-1, 2)))])
    assert CHANGE[0] < seam(turned, 5, 32).position < CHANGE[1]  # type: ignore[union-attr]
    assert not seam(turned, 5, 32).right  # type: ignore[union-attr]


def test_nothing_that_stands_or_cannot_be_read_has_a_seam() -> None:
    assert seam(np.full((12, 2), 3.0), 5, 32) is None
    gap = line(12, (2, 1))
    gap[4] = NAN
    assert seam(gap, 5, 32) is None


def test_loops_are_seams_of_the_clip_with_itself() -> None:
    way = line(9, (2, 0))
    there_and_back = np.concatenate([way, way[-2:0:-1]])
    rolled = np.roll(there_and_back, -4, 0)
    found = wrap(rolled, 32)
    assert found is not None and found.right and found.position == pytest.approx(1)
    one_way = wrap(line(16, (2, 0)), 32)
    assert one_way is not None and one_way.position == pytest.approx(15) and not one_way.right


def test_psnr_on_the_mask_is_about_the_object() -> None:
    true = torch.full((3, 2, 16, 16), -0.88)
    true[:, :, 6:10, 6:10] = 0.9
    shifted = true.roll(4, 3)
    empty = torch.full_like(true, -0.88)
    whole = metrics.psnr(shifted, true)
    masked = metrics.masked_psnr(shifted, true, "black", [0, 1])
    assert masked < whole - 2  # the background no longer helps
    assert metrics.masked_psnr(true, true, "black", [0]) == 60
    # An object where there is none counts, too.
    two = torch.maximum(shifted, true)
    assert metrics.masked_psnr(two, true, "black", [0]) < 20
    assert metrics.masked_psnr(empty, true, "black", [0]) < metrics.masked_psnr(
        two, true, "black", [0]
    )
    assert metrics.psnr(true + 0.2, true) == pytest.approx(20, abs=0.01)


# --- events --------------------------------------------------------------------------------------


def bounce(after: float) -> np.ndarray:
    """At the right wall of a 32-pixel frame, radius 5."""
    return np.concatenate([line(6, (2, 1), (17, 10)), line(5, (-after, 1), (27 - after, 16))])


def test_a_bounce_is_scored_only_where_it_happened() -> None:
    assert bounced(bounce(2), 5, (32, 32)) is True
    assert bounced(bounce(0.8), 5, (32, 32)) is False
    assert bounced(line(11, (2, 0), (5, 10)), 5, (32, 32)) is None
    middle = bounce(2) - (9, 0)  # turns in mid-air
    assert bounced(middle, 3, (32, 32)) is None
    flat = bounce(2)
    flat[6:, 1] = flat[5, 1] - 2 * np.arange(1, 6)
    assert bounced(flat, 5, (32, 32)) is False  # mirrored, but off to the other side


def test_an_occlusion_is_scored_only_where_it_happened() -> None:
    front, back = line(13, (3, 0), (2, 20)), line(13, (-3, 0), (38, 21))
    back[6] = NAN  # hidden
    assert occluded(read_as(front), read_as(back), 13) is True
    assert occluded(read_as(front), read_as(back, straight=False), 13) is False
    assert occluded(read_as(front), read_as(back + (0, 30)), 13) is None
    assert occluded(read_as(front[:6]), read_as(back[:6]), 6) is None  # they have not parted yet


def test_a_collision_is_scored_only_where_it_happened() -> None:
    left = np.concatenate([line(6, (2, 0), (5, 10)), line(7, (-2, 0), (13, 10))])
    right = np.concatenate([line(6, (-2, 0), (35, 10)), line(7, (2, 0), (27, 10))])
    assert collided(read_as(left), read_as(right), 13) is True
    gone = np.concatenate([line(6, (2, 0), (5, 10)), line(7, (0, 0), (15, 10))])
    assert collided(read_as(gone), read_as(right), 13) is False  # momentum from nowhere
    through = line(13, (2, 0), (5, 10)), line(13, (-2, 0), (35, 10))
    assert collided(read_as(through[0]), read_as(through[1]), 13) is None
    assert collided(read_as(left), read_as(right + (0, 40)), 13) is None
