"""The tuner of the attention kernels: its candidates, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tune_attention
from benchmarks.tune_attention import Bench, Kernel, bench, candidates, compared, kernels, main
from sora_kernels import Grid
from sora_kernels.ops.packed_attention.config import Launch

TINY = (18, 1), (Grid(1, 2, 9, tile=(1, 2, 4)),)


def same(runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    return {name: [2e-3 if name == "now" else 1e-3] * 8 for name in runs}


def test_every_kernel_has_other_launches_that_triton_can_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = kernels(None)
    assert len(every) == 2 * 3 * 4 and kernels("packed_attention dq*") == [
        k for k in every if (k.op, k.kind) == ("packed_attention", "dq")
    ]
    now = Launch(128, 64, 8, 3, descriptors=True)
    for kernel in every:
        found = candidates(kernel, now)
        assert now not in found and len(set(found)) == len(found) > 8
        assert {launch.group for launch in found} == {4, 16, 64}
        assert not found[-1].descriptors and all(launch.descriptors for launch in found[:-1])
        for m, n, warps, stages, *_ in found:
            assert m in (32, 64, 128) and n in (32, 64, 128) and warps in (4, 8) and stages < 5
    assert main(["--list", "--only", "*dkv hd64"]) == 0
    assert "windowed_attention dkv hd64: on sm_90 64x64 warps=4" in capsys.readouterr().out


@pytest.mark.parametrize("op", tune_attention.OPS)
@pytest.mark.parametrize("kind", tune_attention.KINDS)
def test_a_candidate_is_run_by_its_own_blocks_and_lists(op: str, kind: str) -> None:
    """In the interpreter; the result is that of the launch in use."""
    at = bench(Kernel(op, kind, 16), TINY, "cpu")
    launch = at.now._replace(block_m=16, block_n=32)
    (row,) = compared(at, [launch], same)
    assert row["kernel"] == f"{op} {kind} hd16" and row["launch"].startswith("16x32 warps=1")
    assert row["faster"] == 2 and row["interval"] == [2, 2] and row["ms"] == 1


def test_a_candidate_that_differs_or_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    at = bench(Kernel("packed_attention", "fwd", 16), TINY, "cpu")
    wrong, broken = at.now._replace(block_m=64), at.now._replace(block_m=128)
    run = Bench.run

    def spoiled(self: Bench, launch: Launch) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            if launch == broken:
                raise RuntimeError("out of resources")
            return tuple(2 * x for x in run(self, self.now)())

        return run(self, launch) if launch == self.now else call

    monkeypatch.setattr(Bench, "run", spoiled)
    rows = list(compared(at, [wrong, broken], same))
    assert rows[0]["refused"].startswith("differs by ") and rows[1]["refused"] == "RuntimeError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "norm*"], "--only: expected a kernel"),
        (["--budget", "0"], "--budget: expected minutes above 0"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
        ([], "measuring needs an NVIDIA GPU"),
    ],
)
def test_bad_commands(arguments: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
