"""CUDA timing on a simulated GPU: a queue that runs behind the host that fills it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sora_kernels.bench import measure_cuda, timing

FLUSH_MS, CALL_MS = 0.05, 0.004  # of the GPU, and of the host that asks for it


class Gpu:
    """Two clocks in milliseconds: the host's, and when the work enqueued so far will be done."""

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.flushes = 0

    def work(self, host_ms: float, gpu_ms: float) -> None:
        self.host += host_ms
        self.done = max(self.done, self.host) + gpu_ms

    def zero_(self) -> None:
        self.flushes += 1
        self.work(CALL_MS, FLUSH_MS)

    def synchronize(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.at = max(gpu.done, gpu.host)

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=60 << 20),
        synchronize=made.synchronize,
        Event=made.event,
    )
    torch = SimpleNamespace(cuda=cuda, int8=None, empty=lambda *a, **k: made)
    monkeypatch.setattr(timing, "torch", torch)
    monkeypatch.setattr(timing, "perf_counter", lambda: 1e-3 * made.host)
    return made


def test_the_launch_of_a_short_kernel_is_not_its_time(gpu: Gpu) -> None:
    """300 us of Python for 20 us of kernel, between calls that cost the host next to nothing."""
    found = measure_cuda(
        {
            "quick": lambda: gpu.work(0.01, 0.02),
            "slow to launch": lambda: gpu.work(0.3, 0.02),
            "long": lambda: gpu.work(0.01, 5.0),
        }
    )
    for name, expected in (("quick", 0.02), ("slow to launch", 0.02), ("long", 5.0)):
        assert found[name] == pytest.approx([expected] * len(found[name])), name


def test_every_call_finds_a_cold_cache_and_a_long_one_runs_few_times(gpu: Gpu) -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        gpu.work(0.01, 3000.0)

    found = measure_cuda({"it": run}, seconds=1.0)
    assert len(found["it"]) == timing.MIN_ROUNDS
    assert calls == 2 + timing.MIN_ROUNDS  # warmed twice, no more
    assert gpu.flushes == 16 + timing.MIN_ROUNDS


def test_what_costs_the_host_too_much_is_not_hidden(gpu: Gpu) -> None:
    """A call whose kernels wait for the host is reported as slow as it is."""
    (times,) = measure_cuda({"it": lambda: gpu.work(40.0, 0.02)}, seconds=0.1).values()
    assert min(times) > 36


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="runs"):
        measure_cuda({})
    with pytest.raises(ValueError, match="min_rounds"):
        measure_cuda({"a": lambda: None}, min_rounds=3, max_rounds=2)
