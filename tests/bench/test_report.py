"""The page of results: self-contained, complete, and made from the files alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report import RESULTS, main, ours_of
from sora_kernels.bench import read_report, write_report

from .reports import report


def test_page_stands_alone_and_shows_every_file(tmp_path: Path) -> None:
    for place, ours in (("cpu", 1.0), ("h200", 4.0)):
        (tmp_path / "results" / place).mkdir(parents=True)
        gpu = {} if place == "cpu" else {"device": "cuda", "gpu": "NVIDIA H200"}
        write_report(tmp_path / "results" / place / "block.json", report(ours, 2.0, **gpu))
    shutil.copy(RESULTS / "cpu" / "sizes.json", tmp_path / "results" / "cpu")
    out = tmp_path / "out"
    assert main(["-o", str(out), "--results", str(tmp_path / "results")]) == 0
    page = (out / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{5})', page)
    pictures = sorted(path.name for path in out.glob("*.png"))
    kinds = ("memory", "roofline", "speedup")
    assert pictures == [f"{place}-block-{kind}.png" for place in ("cpu", "h200") for kind in kinds]
    assert sources == ["data:"] * len(pictures) and "://" not in page
    assert "Measured on: CPU, h200" in page
    assert len(re.findall(r'class="lost">0\.50', page)) == 1  # ours is slower on one of them
    assert "NVIDIA H200" in page and "<td>video 1080x1920</td><td>decode</td>" in page


def test_every_committed_file_is_one_that_the_page_can_show() -> None:
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        if path.stem != "sizes":
            assert ours_of(read_report(path)), path


def test_no_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", str(tmp_path / "out"), "--results", str(tmp_path)]) == 2
    assert "--results: expected" in capsys.readouterr().err
