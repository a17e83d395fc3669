"""The flow's formulas against their definitions, and the sampler against exact solutions."""

from __future__ import annotations

import math

import pytest
import torch

from model import flow
from model.sample import euler


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = torch.randn(2, 50, dtype=torch.float64)
    step = 1e-6
    slope = (flow.interpolate(x0, noise, 0.3 + step) - flow.interpolate(x0, noise, 0.3)) / step
    torch.testing.assert_close(slope, flow.velocity(x0, noise), rtol=1e-6, atol=1e-6)
    assert torch.equal(flow.interpolate(x0, noise, 0.0), x0)
    torch.testing.assert_close(flow.interpolate(x0, noise, 1.0), noise)


def test_shift_keeps_the_ends_moves_to_noise_and_composes() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = flow.shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 2.0), 1.5), shifted)
    # The signal-to-noise ratio (1 - t) / t falls by exactly the shift.
    torch.testing.assert_close((1 - shifted[1:-1]) / shifted[1:-1], (1 - t[1:-1]) / t[1:-1] / 3.0)


def test_size_shift_grows_with_the_square_root_of_the_tokens() -> None:
    assert flow.size_shift(48, 48) == 1.0
    assert flow.size_shift(192, 48, 2.0) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="tokens"):
        flow.size_shift(0, 48)


def test_euler_times_fall_from_one_to_zero() -> None:
    times = flow.euler_times(7, 2.5)
    assert times.shape == (8,) and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()
    with pytest.raises(ValueError, match="steps"):
        flow.euler_times(0)


def test_training_times_are_logit_normal_one_per_stratum() -> None:
    generator = torch.Generator().manual_seed(0)
    t = flow.logit_normal(4000, generator)
    z = torch.logit(t.double())
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    strata = (torch.special.ndtr(z) * 4000).floor()
    assert len(set(strata.tolist())) > 3950  # rounding may move a few across a border
    assert not torch.equal(t, t.sort().values)


def test_loss_by_decile_sorts_by_time() -> None:
    sums, counts = flow.loss_by_decile(
        torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.05, 0.55, 1.0])
    )
    assert counts == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    means = flow.mean_of_deciles(sums, counts)
    assert means[0] == 1.5 and means[5] == 4.0 and means[9] == 8.0 and means[1] is None


def test_euler_is_exact_on_straight_paths_and_leaves_given_parts() -> None:
    x0, noise, given = torch.randn(3, 2, 4, dtype=torch.float64)
    schedule = torch.stack([flow.euler_times(5, 2.0), flow.euler_times(5, 4.0)], dim=1)
    seen = []

    def straight(parts: list[torch.Tensor], times: torch.Tensor) -> list[torch.Tensor]:
        seen.append(times)
        return [noise - x0, torch.full_like(given, math.nan), noise - x0]

    end = euler(straight, [noise, given, noise], [0, None, 1], schedule)
    torch.testing.assert_close(end[0], x0)
    torch.testing.assert_close(end[2], x0)
    assert torch.equal(end[1], given)
    assert len(seen) == 5 and seen[0].tolist() == [1.0, 1.0] and seen[1][1] > seen[1][0]


def test_euler_converges_at_first_order() -> None:
    """dx/dt = x has the solution x(0) = x(1) / e; halving the step halves the error."""
    errors = []
    for steps in (32, 64):
        schedule = flow.euler_times(steps)[:, None]
        (end,) = euler(lambda x, t: x, [torch.ones(1, dtype=torch.float64)], [0], schedule)
        errors.append(abs(end.item() - math.exp(-1)))
    assert 1.9 < errors[0] / errors[1] < 2.1
