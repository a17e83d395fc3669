"""What the ops keep for the backward, counted by autograd itself."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import memory


def test_storages_count_once_and_inputs_apart() -> None:
    x = torch.randn(100)
    views = memory.saved_bytes(lambda v: v["x"].view(10, 10).exp() * v["x"].view(10, 10), {"x": x})
    assert views == {"inputs": 400, "own": 400}  # exp's result is kept twice, by exp and by mul


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ops_of_a_block_keep_half_of_eager(dtype: str) -> None:
    (row,) = memory.measure((dtype,), memory.CHAIN)
    assert row["plain"]["own"] >= 2 * row["ours"]["own"]
    total, plain_total = (sum(row[who].values()) for who in ("ours", "plain"))
    assert plain_total > 1.3 * total


def test_norm_and_gates_keep_statistics_alone() -> None:
    width = memory.HEADS * memory.HEAD_DIM
    for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        (row,) = memory.measure(("bf16",), op)
        per_token = row["ours"]["own"] / memory.inputs("bf16")["layout"].num_tokens
        assert per_token <= 8 < 2 * width, op  # mean and rstd


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "memory.json"
    assert memory.main(["--json", str(target)]) == 0
    assert {row["op"] for row in json.loads(target.read_text())["rows"]} > set(memory.CALLS)
    assert memory.CHAIN in capsys.readouterr().out
    assert memory.main(["--json", str(tmp_path / "no" / "memory.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
