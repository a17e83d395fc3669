"""The command that turns a prompt into a video, and the evaluation, on a tiny random checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import evaluate, generate
from model.checkpoint import save_dit
from model.config import DiTConfig
from model.dit import DiT
from model.sample import Sampling
from model.text import UnknownWords, Vocabulary
from model.vae import VideoVAE, save_vae
from model.video import read_video, write_image
from model.world import VOCABULARY

WORDS = Vocabulary(VOCABULARY)
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = DiTConfig(16, 1, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(WORDS))
    dit = DiT(config)
    torch.nn.init.normal_(dit.head.weight)
    save_dit(path, dit, WORDS, {})
    save_vae(VideoVAE(), path)
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [PROMPT, "-o", str(out), "--checkpoint", str(folder), "--steps", "2", "--quiet", *more]


def test_a_prompt_becomes_a_video(folder: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "new" / "a.mp4", tmp_path / "a.png"
    generate.main(command(folder, out, "--size", "48x32", "--frames", "5",
                          "--frames-png", str(sheet), "--zoom", "2"))  # fmt: skip
    video, fps = read_video(out)
    assert video.shape == (3, 5, 64, 96) and fps == generate.FPS
    assert np.asarray(Image.open(sheet)).shape[1] > 5 * 48
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.mp4", "a.png", "new"]


def test_one_frame_is_an_image(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    generate.main(command(folder, out, "--size", "24x16", "--frames", "1"))
    assert Image.open(out).size == (24, 16)


def test_the_seed_decides(folder: Path) -> None:
    stack = generate.load_stack(folder)
    few, size = Sampling(steps=2), generate.Size(32, 32, 5)

    def make(seed: int) -> torch.Tensor:
        return generate.generate(stack, [PROMPT], [size], seed=seed, sampling=few)[0]

    assert torch.equal(make(3), make(3))
    assert not torch.allclose(make(3), make(4), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["a red zebra moving left"], UnknownWords, "unknown word 'zebra'"),
        (["!?"], ValueError, "at least one word"),
        (["--size", "8x32"], ValueError, "from 16"),
        (["--checkpoint", "nowhere"], ValueError, "nowhere"),
        (["--out", "a.gif"], ValueError, "ends in .mp4"),
        (["--out", "a.png"], ValueError, "one frame"),
        (["--guidance", "nan"], ValueError, "finite"),
        (["--image", "missing.png"], ValueError, "no such file"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path, tmp_path: Path, change: list[str], error: type[Exception], message: str
) -> None:
    arguments = command(folder, tmp_path / "a.mp4")
    if not change[0].startswith("-"):
        arguments[0] = change[0]
        change = []
    with pytest.raises(error, match=message):
        generate.main([*arguments, *change])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [["--size", "huge"], ["--frames", "0"], ["--steps", "x"]])
def test_parser_errors_are_one_line(
    folder: Path, tmp_path: Path, change: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main([*command(folder, tmp_path / "a.mp4"), *change])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_process_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "model.generate", PROMPT, "-o", str(tmp_path / "a.mp4"),
         "--checkpoint", str(tmp_path / "none")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "found none" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


# --- evaluation ----------------------------------------------------------------------------------


def test_wilson_interval_against_known_values() -> None:
    low, high = evaluate.wilson(45, 50)  # Newcombe 1998 gives such intervals to three digits
    assert low == pytest.approx(0.786, abs=2e-3) and high == pytest.approx(0.957, abs=2e-3)
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="right"):
        evaluate.wilson(3, 2)


def test_evaluation_writes_every_row(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    names = ["one_object", "held_out", "image", "image_to_video", "two_objects"]
    only = [text for name in names for text in ("--only", name)]
    evaluate.main(["--checkpoint", str(folder), "--json", str(out), "--clips", "2",
                   "--steps", "1", "--quiet", *only])  # fmt: skip
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert row["clips"] == 2
        for provider in ("generated", "true_clip", "vae_round_trip"):
            score = row[provider]["all"]
            assert 0 <= score["low"] <= score["rate"] <= score["high"] <= 1
    assert rows["one_object"]["true_clip"]["all"]["rate"] == 1.0


def test_evaluation_refuses_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        evaluate.main(["--checkpoint", str(tmp_path), "--json", str(tmp_path / "e.json")])
    assert list(tmp_path.iterdir()) == []
