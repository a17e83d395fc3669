"""The static model: arithmetic by hand, limits of the chips, and the committed kernels."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import sora_kernels
from benchmarks import model
from benchmarks.__main__ import main
from benchmarks.model import (
    ASSUMED,
    Assumed,
    against_measured,
    compact,
    gpu_cases,
    launch_us,
    lookup,
    occupancy,
    predict,
    read_kernels,
)
from benchmarks.model_gpus import GPUS, find
from benchmarks.model_work import Launch, launches
from sora_kernels.aot import AotCase
from sora_kernels.bench import read_report

H200 = GPUS["H200"]
KERNEL = {"kernel": "op/k", "arch": 90, "warps": 4, "regs": 128, "smem": 0}
NO_COST = Assumed(copy_share=1.0, matrix_share=1.0, vector_share=1.0, latency_us=0, launch_us=0)


def test_occupancy_by_registers_smem_warps_and_blocks() -> None:
    assert occupancy(KERNEL, H200) == 65536 // (128 * 32 * 4) == 4
    assert occupancy({**KERNEL, "regs": 129}, H200) == 65536 // (136 * 32 * 4) == 3
    assert occupancy({**KERNEL, "regs": 16, "warps": 1}, H200) == 32  # blocks
    assert occupancy({**KERNEL, "regs": 16, "warps": 16}, H200) == 4  # warps
    assert occupancy({**KERNEL, "regs": 16, "smem": 100_000}, H200) == 2
    assert occupancy({**KERNEL, "smem": 160_000}, GPUS["RTX 5090"]) == 0
    assert launch_us(Launch({**KERNEL, "smem": 160_000}, 1, 1, 1), GPUS["RTX 5090"]) == float("inf")


def test_without_overheads_a_full_launch_takes_its_floor() -> None:
    slots = 4 * H200.sms
    memory = Launch(KERNEL, 10 * slots, bytes=4.8e9, flops=0)
    assert launch_us(memory, H200, NO_COST) == pytest.approx(1000)  # 4.8 GB at 4.8 TB/s
    matrix = Launch(KERNEL, 10 * slots, bytes=0, flops=989.4e9, matrix=True)
    assert launch_us(matrix, H200, NO_COST) == pytest.approx(1000)


def test_one_block_more_than_a_wave_costs_arithmetic_a_step_and_memory_nothing() -> None:
    slots = 4 * H200.sms
    full = Launch(KERNEL, slots, bytes=1e9, flops=1e12, matrix=True)
    more = Launch(KERNEL, slots + 1, 1e9 * (slots + 1) / slots, 1e12 * (slots + 1) / slots, True)
    ratio = launch_us(more, H200, NO_COST) / launch_us(full, H200, NO_COST)
    assert ratio == pytest.approx(5 / 4)  # a fifth block on one multiprocessor
    streams = [replace(launch, flops=0.0) for launch in (full, more)]
    ratio = launch_us(streams[1], H200, NO_COST) / launch_us(streams[0], H200, NO_COST)
    assert ratio == pytest.approx(1 + 1 / slots)


def test_a_loop_of_dependent_loads_waits_for_each() -> None:
    launch = Launch(KERNEL, 4 * H200.sms, bytes=1, flops=0, steps=8)
    expected = 8 * ASSUMED.latency_us + 7 * ASSUMED.step_us + ASSUMED.launch_us
    assert launch_us(launch, H200) == pytest.approx(expected)


def test_a_pipelined_loop_waits_once() -> None:
    launch = Launch(KERNEL, 4 * H200.sms, bytes=1, flops=0, steps=8, pipelined=True)
    expected = ASSUMED.latency_us + 7 * ASSUMED.step_us + ASSUMED.launch_us
    assert launch_us(launch, H200) == pytest.approx(expected)


@pytest.mark.parametrize("name", list(GPUS))
def test_every_case_of_the_benchmarks_is_modelled(name: str) -> None:
    gpu = GPUS[name]
    cases = gpu_cases()
    rows = predict(cases, gpu, read_kernels()[gpu.compiled])
    wanted = {
        (c["op"], c["mode"], c["case"])
        for c in cases
        if c["dtype"] == "bf16" and c["op"] not in ("dispatch", "planner")
    }
    assert {(r["op"], r["mode"], r["case"]) for r in rows} == wanted and len(wanted) > 80
    for row in rows:
        assert 0 < row["floor_us"] < row["predicted_us"], row
        assert 0 < row["occupancy"] <= 1, row


@pytest.mark.parametrize(
    ("gpu", "by_descriptors"),
    [("A100", ""), ("H200", "fwd dq dkv"), ("B200", "fwd dq"), ("RTX 5090", "fwd")],
)
def test_attention_is_modelled_by_the_kernels_that_a_chip_launches(
    gpu: str, by_descriptors: str
) -> None:
    numbers = {"op": "packed_attention", "dtype": "bf16", "bytes": 8e9, "flops": 1e12}
    kernels = read_kernels()[GPUS[gpu].compiled]
    found = {
        launch.kernel["kernel"].partition("/")[2]
        for mode in ("fwd", "bwd")
        for launch in launches(
            {**numbers, "mode": mode, "case": "one 1 segments 8192x24x128"}, lookup(kernels)
        )
        or []
    }
    expected = {
        f"{kind}_hd128_bf16" + "_tma" * (kind in by_descriptors.split())
        for kind in ("fwd", "delta", "dq", "dkv")
    }
    assert found == expected


def test_the_kernels_are_those_of_the_source() -> None:
    """Attention has its own pace: `--refresh` after its configurations change."""
    named = {row["kernel"]: row for rows in read_kernels().values() for row in rows.values()}
    ops = Path(sora_kernels.__file__).parent / "ops"
    for op in sorted(p.parent.name for p in ops.glob("*/kernels.py")):
        if op.endswith("attention"):
            continue
        module = importlib.import_module(f"sora_kernels.ops.{op}.kernels")
        cases: list[AotCase] = module.aot_cases()
        assert cases
        for case in cases:
            row = {"kernel": f"{op}/{case.name}", "arch": 90, "config": case.config, "ok": True}
            (now,) = compact({"rows": [{**row, "regs": 0, "smem": 0}]})
            then = named[now["kernel"]]
            assert now == {**then, "arch": 90, "regs": 0, "smem": 0}, (
                "run python -m sora_kernels.aot --json F and python -m benchmarks model --refresh F"
            )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--gpu", "NVIDIA H200", "--json", str(tmp_path / "m.json")]) == 0
    assert "modelled, not measured" in capsys.readouterr().out
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["gpus"]["H200"]["gbps"] == 4800 and len(written["rows"]) > 80
    for arguments in (["--gpu", "H300"], ["--only", "nonsense"], ["--refresh", "nothing.json"]):
        assert main(["model", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_cpu_results_stand_against_their_ceiling_and_gpu_results_against_the_model(
    tmp_path: Path,
) -> None:
    report = read_report(model.RESULTS / "cpu" / "ops.json")
    rows = against_measured(report)
    assert rows and {row["basis"] for row in rows} == {"ceiling"}
    assert model.plot(rows, tmp_path / "cpu.png", "note").stat().st_size > 10_000
    gpu = {**report, "env": {**report["env"], "device": "cuda", "gpu": "NVIDIA H200"}}
    gpu["ceilings"] = {"copy_gbps": 2400.0, "matmul_tflops": 494.7}
    half = {row["op"]: row for row in against_measured(gpu) if row["mode"] == "fwd"}
    assert {row["basis"] for row in half.values()} == {"model"}
    gpu["ceilings"] = {"copy_gbps": 4800.0, "matmul_tflops": 989.4}
    full = {row["op"]: row for row in against_measured(gpu) if row["mode"] == "fwd"}
    assert full["gate_residual"]["predicted_ms"] < half["gate_residual"]["predicted_ms"] < 1


def test_unknown_gpu() -> None:
    assert find("NVIDIA GeForce RTX 5090").name == "RTX 5090"
    with pytest.raises(ValueError, match="--gpu: expected one of A100"):
        find("T4")
