"""The emulator behind these tests computes what CUDA does, and finds what it should find."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda_emulator import build_toy


@pytest.fixture(scope="module")
def toy() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_toy()))


def call(toy: ctypes.CDLL, name: str, order: int = 0) -> tuple[int, torch.Tensor, torch.Tensor]:
    x, y = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    toy.sora_emulator_order(order)
    status = getattr(toy, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    toy.sora_emulator_order(0)
    return status, x, y


@pytest.mark.parametrize("order", [0, 1])
def test_a_barrier_is_a_barrier(toy: ctypes.CDLL, order: int) -> None:
    status, x, y = call(toy, "reverse", order)
    assert status == 0 and torch.equal(y, x.flip(0))


def test_a_race_shows(toy: ctypes.CDLL) -> None:
    """Shared memory read before it was written is NaN, and which half that is depends on order."""
    forth, back = call(toy, "race", 0)[2], call(toy, "race", 1)[2]
    assert torch.isnan(forth).any() and not torch.equal(forth.nan_to_num(), back.nan_to_num())


@pytest.mark.parametrize("name", ["divergent", "divergent_shuffle"])
def test_a_barrier_that_some_threads_miss_is_an_error(toy: ctypes.CDLL, name: str) -> None:
    assert call(toy, name)[0] == 1


def test_shuffles(toy: ctypes.CDLL) -> None:
    status, x, y = call(toy, "shuffles")
    lane, base = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    up = torch.where(lane % 16 >= 5, lane - 5, lane)
    down = torch.where(lane + 3 < 32, lane + 3, lane)
    expected = x[base + (lane ^ 1)] + 100 * x[base] + 1e4 * x[base + down] + 1e6 * x[base + up]
    assert status == 0 and torch.equal(y, expected)


@pytest.mark.parametrize("name", ["waited", "ring"])
def test_copies_that_were_waited_for_are_there(toy: ctypes.CDLL, name: str) -> None:
    status, x, y = call(toy, name)
    assert status == 0 and torch.equal(y, x)


def test_a_copy_that_was_not_waited_for_shows(toy: ctypes.CDLL) -> None:
    status, _, y = call(toy, "too_early")
    assert status == 0 and torch.isnan(y).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_those_of_torch(toy: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 31), 1 << 31, 262147, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([float("inf"), -0.0, 65519.9, 1e-8])])
    y = torch.empty_like(x)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
    toy.round_trip(*pointers, x.numel(), int(dtype is torch.float16))
    torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
