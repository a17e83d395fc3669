"""The suite that measures `accelerate` on blocks of every family, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import dropin, readme
from benchmarks.dropin_blocks import FAMILIES
from benchmarks.registry import Context
from benchmarks.runner import Disagreement
from sora_kernels import accelerate
from tests.families.documented import documented

NAMES = {"Wan", "HunyuanVideo", "CogVideoX", "LTX-Video", "Mochi", "Latte", "Allegro", "Cosmos",
         "Flux", "SD3", "PixArt", "DiT"}  # fmt: skip


def test_every_family_has_cases_of_every_way() -> None:
    cases = list(dropin.cases(Context()))
    assert len({c.name for c in cases}) == len(cases) == 6 * len(FAMILIES)
    assert {c.op for c in cases} == NAMES
    for case in cases:
        assert set(case.providers) == {"sora_kernels", "plain", "compile", "patched_compile"}
        assert (case.mode == "fwd+bwd") or "LoRA" not in case.case
    assert len(list(dropin.cases(Context(quick=True)))) == 3


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_blocks_are_fused_whole(make: Any) -> None:
    """As the docs list them; on no memory."""
    with torch.device("meta"):
        family, block = make(), make().block()
    report = accelerate(block, strict=True)
    row = documented()[report.families[0]]
    assert type(block).__name__ in row["block class"]
    parameters, flops = dropin.work(family)
    assert 0.9 * parameters < sum(p.numel() for p in block.parameters()) < 1.06 * parameters
    modulation = sum(p.numel() for n, p in block.named_parameters() if "norm" in n)
    assert 2 * (parameters - modulation) * family.samples < flops


class Rounded(nn.Module):
    """A linear layer that upstream computes in bf16; ``wrong`` is added to its weight."""

    def __init__(self, weight: Tensor, wrong: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight + wrong)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_wrong_results_are_refused(dtype: torch.dtype, mode: str) -> None:
    """Half formats are judged by an fp32 run."""
    weight = torch.randn(16, 16, generator=torch.manual_seed(0))
    given: dict[str, Any] = {
        "plain": Rounded(weight).to(dtype), "ours": Rounded(weight).to(dtype),
        "arguments": (torch.randn(4, 16).to(dtype),), "streams": 1,
    }  # fmt: skip
    dropin.provider("plain", mode)(given)
    assert all(0 <= e < 0.02 for e in given["upstream"])
    dropin.provider("ours", mode)(given)
    for wrong in (0.1, float("nan")):
        given["ours"] = Rounded(weight, wrong).to(dtype)
        with pytest.raises(Disagreement, match="ours: result 0 differs from upstream in fp32 by"):
            dropin.provider("ours", mode)(given)


def row(case: str, mode: str, dtype: str, provider: str, ms: float, mb: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "op": case.split()[0], "case": case, "mode": mode, "dtype": dtype, "provider": provider,
        "p50_ms": ms, "peak_mem_mb": mb,
    }  # fmt: skip
    if provider == "sora_kernels":
        found["paired"] = {"plain": {"median": 12 / ms, "low": 0.9, "high": 2.0}}
    return found


def test_tables_join_the_reports_of_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"cpu": "A CPU", "threads": 2, "torch": "2", "date": "2026-01-01T0", "commit": "abc"}
    for name, refused in (("Wan a", []), ("DiT b", [{"case": "DiT/x", "error": "too far"}])):
        rows = [
            row(name + lora, mode, "fp32", provider, ms, mb)
            for lora, mode in (("", "fwd"), (", LoRA", "fwd+bwd"))
            for provider, ms, mb in (("plain", 12, 50), ("compile", 11, 30),
                                     ("sora_kernels", 16 if name == "DiT b" else 10, 25),
                                     ("patched_compile", 10, 20))
        ]  # fmt: skip
        report = {
            "env": {**env, "skipped": [], "errors": refused},
            "ceilings": {"copy_gbps": 1.0, "matmul_tflops": 1.0},
            "rows": rows,
        }
        (tmp_path / f"dropin_{name[:3]}.json").write_text(json.dumps(report))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    short = readme.dropin().splitlines()
    assert "| Wan a | 1.20 (1.10) | - | 1.20 (1.10) | - | 25 of 50 |" in short
    assert "| DiT b | 0.75 (1.10) | - | 0.75 (1.10) | - | 25 of 50 |" in short  # a loss
    assert sum(line.startswith("| ") for line in short) == 4 and "A CPU" in short[-1]
    whole = readme.all_dropin()
    assert "| DiT b fp32 fwd | 12 | 11 | 16 | 10 | 0.75 [0.90, 2.00] | 50 / 30 / 25 / 20 |" in whole
    assert "- DiT/x: too far" in whole
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "empty")
    assert readme.dropin() == readme.all_dropin() == "Not measured yet."
