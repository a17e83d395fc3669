"""The evaluation of a checkpoint, on random weights: its file, its rows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.readme import table
from benchmarks.scores import certificate, scores
from model import chained, evaluate
from model.checkpoint import save_dit
from model.config import DiTConfig
from model.dit import DiT
from model.judge import frozen
from model.judge.certify import certify
from model.sample import Sampling
from model.stack import Stack, load_stack
from model.suites import SUITES, items_of, job_of
from model.text import Vocabulary
from model.vae import VideoVAE, save_vae
from model.world import VOCABULARY, render

FEW = Sampling(steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    words = Vocabulary(VOCABULARY)
    dit = DiT(DiTConfig(16, 1, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(words)))
    torch.nn.init.normal_(dit.head.weight)
    save_dit(path, dit, words, {})
    save_vae(VideoVAE(), path)
    return path


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return load_stack(folder)


def command(folder: Path, out: Path, *names: str) -> list[str]:
    only = [text for name in names for text in ("--only", name)]
    return ["--checkpoint", str(folder), "--json", str(out), "--clips", "2", "--steps", "1",
            "--guidance", "1", "--quiet", *only]  # fmt: skip


def test_rows_are_written_kept_and_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(frozen, "check", lambda: checked.append(True))
    out = tmp_path / "e.json"
    evaluate.main([*command(folder, out, "image_to_video", "image"), "--sheets", str(tmp_path)])
    evaluate.main([*command(folder, out, "one_object"), "--keep", "--headline", "3"])
    assert len(checked) == 2 and (tmp_path / "image_to_video.png").exists()
    report = json.loads(out.read_text())
    assert report["judge"] == frozen.stamp() and report["schema"] == 2
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["one_object", "image", "image_to_video"]
    assert [row["clips"] for row in rows.values()] == [3, 2, 2]
    assert rows["one_object"]["metrics"]["all"]["ceilings"]["true"]["value"] == 1
    first = rows["image_to_video"]["metrics"]["first_frame_db"]
    assert first["void"] and first["pasted"]["value"] > first["generated"]["value"]
    assert set(rows["image"]["metrics"]["all"]["floors"]) == {"shuffled"}
    shown = scores(report, table)
    assert "| one_object (32x32, 9 frames, n=3) | all" in shown and "first_frame_db (void)" in shown
    with pytest.raises(ValueError, match="equal sampling"):
        evaluate.main([*command(folder, out, "image"), "--keep", "--steps", "2"])


def test_a_chain_is_as_long_as_promised_and_read_in_windows(stack: Stack) -> None:
    row = chained.evaluate(stack, 16, 1, FEW, links=2)
    assert row["clips"] == 1 and row["frames"] == 27
    ceiling = row["metrics"]["all"]["ceilings"]["true"]
    assert ceiling["value"] == 1 and ceiling["n"] == 2
    assert row["metrics"]["motion"]["floors"]["repeat"]["value"] == 0
    assert {"first_quarter_all", "last_quarter_speed_ratio"} <= set(row["metrics"])
    assert chained.CONTEXT * (chained.LINKS + 1) >= 60 * 8
    (scene,) = chained.scenes_of(1, 3, links=4)
    flags = chained.windows(render(scene), scene)
    assert len(flags) == 4 and all(flag["motion"] for flag in flags)
    assert all(abs(float(flag["speed_ratio"] or 0) - 1) < 0.3 for flag in flags)


def test_packs_keep_the_order_and_respect_the_budget(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = [suite for suite in SUITES if suite.name in ("image", "loop", "extend_forward")]
    jobs = [job_of(item, 1) for suite in suites for item in items_of(suite, 2, 1)]
    sizes = []

    def made(_: Stack, part: list, __: Sampling) -> list[torch.Tensor]:
        sizes.append(len(part))
        return [torch.tensor(jobs.index(job)) for job in part]

    monkeypatch.setattr(evaluate, "make", made)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 300)
    clips = evaluate.in_packs(stack, jobs, FEW)
    assert [int(clip) for clip in clips] == list(range(len(jobs))) and len(sizes) > 1


def test_what_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--only: expected some of one_object"):
        evaluate.main(command(folder, tmp_path / "e.json", "flying"))
    monkeypatch.setattr(frozen, "check", lambda: None)
    with pytest.raises(ValueError, match="found none"):
        evaluate.main(command(tmp_path, tmp_path / "e.json", "image"))
    assert list(tmp_path.iterdir()) == []


def test_the_certificates_table() -> None:
    report = certify(None, 2, 1, 1)
    shown = certificate(report, table)
    assert "| one (32x32, 9 frames, n=2) | true | 100% [34, 100]" in shown
    assert "noise_0.4" in shown and shown.count("\n") > 15
