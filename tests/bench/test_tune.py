"""The tuner and its tables: the search, what is adopted, what a table may say, and who reads it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.registry import op_cases
from benchmarks.tune import candidates, chip_file, main, settings, write_table
from benchmarks.tune_libraries import library_rules
from sora_kernels.aot import ARCHS
from sora_kernels.ops import _tables
from sora_kernels.ops._tables import Lookup, forced, read_table, recorded
from sora_kernels.ops.norm_modulate import config
from sora_kernels.ops.packed_attention.libraries import Call, choose

ROOT = Path(__file__).parents[2]
WIDTH = 1152
LOOKUP = Lookup("norm_modulate", "forward", (("width", WIDTH),), (2048, 1, 4),
                ("block_d", "block_rows", "num_warps"), ("block_rows", "num_warps"))  # fmt: skip


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables in place of the committed ones."""
    monkeypatch.setattr(_tables, "OPS", tmp_path)
    _tables._table.cache_clear()
    yield tmp_path
    _tables._table.cache_clear()


def test_search_space() -> None:
    found = candidates(LOOKUP)
    assert found and settings(LOOKUP) not in [{"block_d": 2048, **c} for c in found]
    assert found == candidates(LOOKUP) and len({tuple(c.values()) for c in found}) == len(found)
    assert found[0] in ({"block_rows": 1, "num_warps": 8}, {"block_rows": 1, "num_warps": 2})
    for c in found:
        assert set(c) == {"block_rows", "num_warps"}
        assert 4 <= 2048 * c["block_rows"] / (32 * c["num_warps"]) <= 64


def test_a_table_is_read_by_pure_lookup_for_its_chip_and_shape_alone(tables: Path) -> None:
    default = config.forward(WIDTH)
    entry = {"kernel": "forward", "width": WIDTH, "config": {"num_warps": 8}}
    write_table(chip_file(tables, "norm_modulate", "9.0"), {"launches": [entry]})
    assert config.forward(WIDTH, (9, 0)) == default._replace(num_warps=8) != default
    assert config.forward(WIDTH, (8, 0)) == config.forward(WIDTH) == default
    assert config.forward(384, (9, 0)) == config.forward(384)


def test_writing_merges_and_keeps_other_keys(tables: Path) -> None:
    path = chip_file(tables, "packed_attention", "9.0")
    write_table(path, {"rules": [{"prefer": ["own"]}]})
    for warps in (8, 16):
        entry = {"kernel": "forward", "width": 1, "config": {"num_warps": warps}, "faster": 1.1}
        write_table(path, {"launches": [entry]})
    written = json.loads(path.read_text())
    assert written["rules"] and [e["config"] for e in written["launches"]] == [{"num_warps": 16}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"width": 1, "config": {"num_warps": 4}}, "expected an object with a kernel"),
        ({"kernel": "forward", "config": {}}, "expected fields and their values"),
        ({"kernel": "forward", "config": {"num_warps": 3}}, "num_warps: expected a power of two"),
        ({"kernel": "forward", "config": {"num_warps": 64}}, "num_warps: expected up to 32"),
        ({"kernel": "forward", "width": "1", "config": {"num_warps": 1}}, "width: expected an int"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"launches": [entry]}))
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert "launches[0]" in str(caught.value)


def test_a_table_cannot_change_what_correctness_rests_on(tables: Path) -> None:
    entry = {"kernel": "forward", "width": WIDTH, "config": {"block_d": 512}}
    write_table(chip_file(tables, "norm_modulate", "9.0"), {"launches": [entry]})
    with pytest.raises(ValueError, match="expected fields of .*num_warps.* got block_d"):
        config.forward(WIDTH, (9, 0))


def test_only_what_is_faster_beyond_doubt_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search with made-up times: warps decide, one candidate is wrong and one does not run."""

    def ours(x: torch.Tensor) -> torch.Tensor:
        made = config.forward(WIDTH)
        if made.num_warps == 2:
            raise RuntimeError("too few")
        return x + 100.0 * (made.num_warps == 16)

    (case,) = op_cases(
        "norm_modulate", "c", "bf16", inputs=lambda device: {"x": torch.ones(4)}, ours=ours,
        plain=ours, bytes={"fwd": 1}, flops={"fwd": 1}, compile=False,
    )  # fmt: skip
    monkeypatch.setattr("benchmarks.registry.load", lambda *_: [case])

    def timer(runs: Mapping[str, Any]) -> dict[str, list[float]]:
        with recorded() as found:
            runs["candidate"]()
        (lookup,) = found
        key = lookup[:3]
        warps = _forced_warps(key)
        candidate = {8: 0.9, 1: 0.995}.get(warps, 2.0)
        return {"now": [1.0] * 9, "candidate": [candidate] * 9}

    def _forced_warps(key: Any) -> int:
        return seen[-1]["num_warps"] if (seen := watched.get(key)) else 0

    watched: dict[Any, list[Mapping[str, int]]] = {}

    def watching(lookup: Lookup, changes: Mapping[str, int]) -> Any:
        watched.setdefault(lookup[:3], []).append(changes)
        return forced(lookup, changes)

    monkeypatch.setattr(tune, "forced", watching)
    (found,) = tune.tune("norm_modulate", None, "cpu", timer, 60.0)
    assert found.config["num_warps"] == 8 and found.faster.median == pytest.approx(1 / 0.9)
    assert found.entry()["kernel"] == "forward" and found.entry()["width"] == WIDTH


def test_dry_run_lists_candidates_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    ops = ("bias_gelu", "gate_residual", "gate_residual_norm_modulate", "guided_step", "patchify",
           "norm_modulate", "norm_silu", "causal_conv_pad", "qk_norm_rope")  # fmt: skip
    for op in ops:
        assert main(["--op", op, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert f"{op} " in out and "num_warps" in out and " -> " in out, op


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nonsense"], "--op: expected one of"),
        (["--op", "bias_gelu", "--budget", "0"], "--budget: expected minutes above 0"),
        (["--libraries", str(ROOT / "benchmarks/results/cpu/ops.json")], "not measured on a GPU"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_every_committed_table_entry_compiles(tables: Path) -> None:
    """In a process of its own: this one interprets. Also with a table made here, because none is
    committed yet."""
    write_table(
        chip_file(tables, "norm_modulate", "9.0"),
        {"launches": [{"kernel": "forward", "width": WIDTH, "config": {"num_warps": 8}}]},
    )
    folders = (tables, ROOT / "sora_kernels" / "ops")
    script = (
        "import sys; from pathlib import Path; from benchmarks.tune import check_tables\n"
        "print([check_tables(Path(folder)) for folder in sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, (checked, problems) in zip(folders, ast.literal_eval(done.stdout), strict=True):
        committed = [path for arch in ARCHS for path in folder.glob(f"*/configs/sm_{arch}.json")]
        assert checked == sum(len(read_table(path)) for path in committed)
        assert problems == []


def _row(mode: str, case: str, provider: str, ms: float) -> dict[str, Any]:
    return {"op": "packed_attention", "mode": mode, "case": case, "provider": provider,
            "p50_ms": ms}  # fmt: skip


def test_library_rules_are_read_back_by_the_dispatch() -> None:
    short, long = "one 1 segments 8192x24x128", "one 1 segments 32768x24x128"
    rows = []
    for case, theirs in ((short, 2.0), (long, 0.5)):
        rows += [_row("fwd", case, "sora_kernels", 1.0), _row("fwd", case, "sdpa_cudnn", theirs)]
        rows += [_row("bwd", case, "sora_kernels", 2.0), _row("bwd", case, "plain", 0.1)]
    rules = library_rules({"rows": rows})
    assert rules == [
        {"min_seqlen": 32768, "head_dim": 128, "training": False, "equal": True,
         "prefer": ["sdpa_cudnn", "own"]}
    ]  # fmt: skip

    def call(length: int, training: bool) -> Call:
        return Call(chip=(9, 0), dtype=torch.bfloat16, head_dim=128, heads=24, heads_k=24,
                    max_seqlen=length, equal=True, causal=False, training=training,
                    return_lse=False, deterministic=False, compiling=False)  # fmt: skip

    assert choose(call(40000, False), tuple(rules))[0] == "sdpa_cudnn"
    assert choose(call(8192, False), tuple(rules))[0] == "own"
    assert choose(call(40000, True), tuple(rules))[0] == "own"
    rows[1]["p50_ms"], rows[5]["p50_ms"] = 0.5, 2.0  # the library is faster where it is short
    found = library_rules({"rows": rows})
    assert [(r["min_seqlen"], r["prefer"][0]) for r in found] == [
        (32768, "own"), (8192, "sdpa_cudnn"),
    ]  # fmt: skip


def test_library_rules_of_windows() -> None:
    from benchmarks.bench_windowed_attention import CUDA

    case = CUDA[0].case
    measured = (("sora_kernels", 2.0), ("flash_attn_4", 1.0), ("plain", 0.1))
    rows = [_row(mode, case, name, ms) for mode in ("fwd", "bwd") for name, ms in measured]
    rules = library_rules({"rows": rows})
    assert rules == [
        {"min_seqlen": 115200, "head_dim": 128, "training": training, "windowed": True,
         "prefer": ["flash_attn_4", "own"]}
        for training in (False, True)
    ]  # fmt: skip
