"""The page of results: self-contained, complete, and made from the files alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report import PEER, RESULTS, main, ours_of, rivals_of
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
    sources = re.findall(r'src="([^"]{5})', page)
    pictures = sorted(path.name for path in out.glob("*.png"))
    kinds = ("memory", "roofline", "speedup")
    assert pictures == [f"{place}-block-{kind}.png" for place in ("cpu", "h200") for kind in kinds]
    assert sources == ["data:"] * len(pictures) and "://" not in page
    assert "Measured on: CPU, h200" in page
    assert len(re.findall(r'class="lost">0\.50', page)) == 1  # ours is slower on one of them
    for tag in ("tr", "table", "td", "p", "details"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0, tag
    for link in re.findall(r'href="([^"]*)"', page):
        assert f'id="{link[1:]}"' in page
    assert "Not measured on h200 yet: ops, e2e, dropin." in page
    assert "NVIDIA H200" in page and "<td>video 1080x1920</td><td>decode</td>" in page


def test_every_committed_file_is_one_that_the_page_can_show() -> None:
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        if path.stem != "sizes":
            assert ours_of(read_report(path)), path


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    """Never empty axes: no GPU at all, then one that the static model does not know."""
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "cpu").mkdir(parents=True)
    write_report(results / "cpu" / "block.json", report(1.0, None))
    assert main(["-o", str(out), "--results", str(results)]) == 0
    page = (out / "index.html").read_text()
    assert "GPU: not measured" in page and "ops, block, e2e, dropin are missing" in page
    assert "Memory: nothing to draw, no row has the memory of plain PyTorch" in page
    assert not list(out.glob("*speedup*")) and not list(out.glob("*memory*"))
    (results / "b300").mkdir()
    gpu = report(1.0, 2.0, device="cuda", gpu="NVIDIA B300")
    write_report(results / "b300" / "ops.json", gpu)
    (results / "b300" / "lane.json").write_text("{}")  # of the lane, no report
    assert main(["-o", str(out), "--results", str(results)]) == 0
    page = (out / "index.html").read_text()
    assert re.search(r"Predicted against measured: nothing to draw, [^<]*B300", page)
    assert "GPU: not measured" not in page and "b300 yet: block, e2e, dropin." in page


def test_libraries_are_told_from_other_forms_of_plain_and_of_ours() -> None:
    ratio = {"median": 2.0, "low": 1.9, "high": 2.1}
    slower = {"median": 1.5, "low": 1.4, "high": 1.6}
    paired = {
        "plain": ratio,
        "plain_real": ratio,
        "copy": ratio,
        "cuda": ratio,
        "flash_attn_2": ratio,
    }
    assert rivals_of({"paired": paired}) == {"plain": ratio, PEER: ratio}
    assert rivals_of({"paired": paired | {"sdpa_cudnn": slower}})[PEER] == slower


def test_no_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", str(tmp_path / "out"), "--results", str(tmp_path)]) == 2
    assert "--results: expected" in capsys.readouterr().err
