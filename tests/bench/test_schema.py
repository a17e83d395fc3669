"""Reports are checked on the way out and on the way in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sora_kernels.bench import read_report, validate, write_report

from .reports import CEILINGS, report

KEYS = (
    "suite op mode case dtype provider p20_ms p50_ms p80_ms bytes flops gbps tflops roofline "
    "peak_mem_mb"
).split()


def test_rows_hold_what_the_schema_promises() -> None:
    made = report(2.0, 5.0)
    validate(made)
    for row in made["rows"]:
        assert set(KEYS) <= set(row)
    ours = made["rows"][0]
    assert ours["p50_ms"] == pytest.approx(2.0)
    assert ours["gbps"] == pytest.approx(1e6 / 2e-3 / 1e9)
    assert ours["tflops"] == pytest.approx(1e3 / 2e-3 / 1e12)
    # 1 MB at 10 GB/s is 0.1 ms; 1000 flops at 0.1 TFLOP/s are nothing beside it.
    assert ours["roofline"] == pytest.approx(0.1 / 2.0)
    assert ours["paired"]["plain"]["median"] == pytest.approx(2.5, rel=0.05)


def test_floor_is_the_larger_of_traffic_and_arithmetic() -> None:
    assert CEILINGS.floor_ms(1e7, 1e6, "fp32") == pytest.approx(1.0)
    assert CEILINGS.floor_ms(1e6, 1e9, "fp32") == pytest.approx(10.0)


def _broken() -> list[tuple[str, dict[str, Any]]]:
    def change(**changes: Any) -> dict[str, Any]:
        made = copy.deepcopy(report(2.0, 5.0))
        made["rows"][1].update(changes)
        return made

    no_key = copy.deepcopy(report(2.0, 5.0))
    del no_key["rows"][0]["roofline"]
    twice = copy.deepcopy(report(2.0, 5.0))
    twice["rows"].append(twice["rows"][0])
    return [
        (r"rows\[0\] lacks roofline", no_key),
        (r"rows\[2\] repeats rows\[0\]", twice),
        (r"rows\[1\]\.mode must be one of fwd, bwd, fwd\+bwd", change(mode="forward")),
        (r"rows\[1\]\.dtype", change(dtype="float32")),
        (r"rows\[1\]\.p50_ms must be a finite number", change(p50_ms=float("nan"))),
        (r"rows\[1\]\.p20_ms must be positive", change(p20_ms=0)),
        (r"rows\[1\]\.gbps must be not negative", change(gbps=-1.0)),
        (r"rows\[1\]\.bytes must be a finite number", change(bytes="many")),
        (r"ordered p20_ms <= p50_ms", change(p20_ms=9.0)),
        (r"rows\[1\]\.provider must be a non-empty string", change(provider="")),
        (r"rows\[1\]\.samples_ms\[1\]", change(samples_ms=[1.0, -1.0])),
        (r"schema must be 1", {**report(2.0, 5.0), "schema": 2}),
        (r"env must be an object", {**report(2.0, 5.0), "env": None}),
        (r"ceilings\.copy_gbps", {**report(2.0, 5.0), "ceilings": {"matmul_tflops": 1}}),
        (r"rows must be a list with at least one", {**report(2.0, 5.0), "rows": []}),
        (r"the report must be a JSON object", []),  # type: ignore[list-item]
    ]


@pytest.mark.parametrize(("message", "broken"), _broken())
def test_validate_names_the_fault(message: str, broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        validate(broken)


def test_written_reports_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    made = report(2.0, 5.0)
    write_report(path, made)
    assert read_report(path) == json.loads(json.dumps(made))
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_invalid_report_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, report(2.0, 5.0))
    before = path.read_text()
    with pytest.raises(ValueError, match="rows"):
        write_report(path, {**report(2.0, 5.0), "rows": []})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"{", "is not JSON"), (b"\xff\xfe", "cannot read"), (b"[]", "object")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_report(path)
