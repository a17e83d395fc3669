"""The benchmark of large sizes: its stages run, and too much memory is an error."""

from __future__ import annotations

import json

import pytest

from benchmarks import sizes


@pytest.mark.parametrize("name", sizes.STAGES)
def test_stages(name):
    call, tokens = sizes.stage(name, (48, 32, 5))
    out = call()
    assert tokens == 2 * 4 * 6 + (8 if name == "denoise" else 0)
    shape = {"encode": (1, 16, 2, 4, 6), "decode": (1, 3, 5, 32, 48), "denoise": (16, 2, 4, 6)}
    assert (out[0] if name == "denoise" else out).shape == shape[name]


def test_the_bound_is_checked(tmp_path, monkeypatch, capsys):
    row = {"case": "image 2048x2048", "stage": "decode", "tokens": 65536, "seconds": 1.0,
           "peak_mb": sizes.BOUND_MB, "before_mb": 270}  # fmt: skip
    monkeypatch.setattr(sizes, "run_all", lambda chosen: [row])
    report = tmp_path / "sizes.json"
    assert sizes.main(["--json", str(report)]) == 0
    assert json.loads(report.read_text())["rows"] == [row]
    row["peak_mb"] += 1
    assert sizes.main(["--json", str(report)]) == 1
    assert "over the bound of 4096 MB: image 2048x2048, decode: 4097 MB" in capsys.readouterr().err


def test_this_process_has_a_peak():
    assert 50 < sizes.peak_mb() < 100_000
