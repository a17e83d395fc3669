"""The command that turns a prompt and known frames into a video, on a tiny random checkpoint."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model import generate, modes, modes_sheet
from model.checkpoint import save_dit
from model.config import DiTConfig
from model.dit import DiT
from model.provenance import verify
from model.sample import Sampling
from model.stack import Size, Stack, load_stack
from model.text import UnknownWords, Vocabulary
from model.vae import VideoVAE, save_vae
from model.video import read_video, write_image, write_video
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
    verdict = verify(out)
    assert verdict.state == "valid" and verdict.about is not None
    assert (verdict.about["prompt"], verdict.about["mode"]) == (PROMPT, "text")


def test_a_file_that_cannot_be_signed_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "key.pem").write_text("not a key")
    monkeypatch.setenv("SORA_KERNELS_KEYS", str(tmp_path / "keys"))
    with pytest.raises(ValueError, match="cannot be signed"):
        generate.main(command(folder, tmp_path / "a.mp4", "--frames", "1", "--size", "16x16"))
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


def test_one_frame_is_an_image(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    generate.main(command(folder, out, "--size", "24x16", "--frames", "1"))
    assert Image.open(out).size == (24, 16) and verify(out).state == "valid"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs: clips of 9, 3 and 1 frames, one of another size, a picture, a sound, no bytes."""
    path = tmp_path_factory.mktemp("media")
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, 9, 16, 24, generator=generator) * 2 - 1
    write_video(path / "nine.mp4", clip, fps=6)
    write_video(path / "three.mp4", clip[:, :3], fps=6)
    write_video(path / "one.mp4", clip[:, :1], fps=6)
    write_video(path / "other.mp4", clip[:, :, :, :16], fps=6)
    write_image(path / "first.png", clip)
    with av.open(str(path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (path / "empty.mp4").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("options", "shape", "fps"),
    [
        (["--image", "first.png"], (9, 16, 24), 8),
        (["--image", "first.png", "--frames", "6"], (6, 16, 24), 8),
        (["--size", "30x18", "--frames", "4"], (4, 18, 30), 8),
        (["--loop", "--size", "24x16"], (16, 16, 24), 8),
        (["--loop", "--frames", "8"], (8, 32, 32), 8),
        (["--extend", "nine.mp4"], (18, 16, 24), 6),
        (["--extend", "nine.mp4", "--direction", "backward", "--frames", "5", "--times", "3"],
         (24, 16, 24), 6),
        (["--connect", "nine.mp4", "nine.mp4", "--frames", "7"], (25, 16, 24), 6),
        (["--fill", "nine.mp4", "--frames-mask", "4:7"], (9, 16, 24), 6),
        (["--super-resolve", "nine.mp4", "--factor", "2"], (17, 16, 24), 12),
        (["--edit", "three.mp4", "--strength", "0.3"], (3, 16, 24), 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_every_mode_has_its_command(
    folder: Path, media: Path, tmp_path: Path, options: list[str], shape: tuple, fps: float
) -> None:
    out = tmp_path / "a.mp4"
    with_paths = [str(media / text) if "." in text and text[-1].isalnum() and
                  (media / text).exists() else text for text in options]  # fmt: skip
    generate.main(command(folder, out, *with_paths))
    video, rate = read_video(out)
    assert video.shape == (3, *shape) and rate == pytest.approx(fps)
    assert list(tmp_path.iterdir()) == [out]


def test_known_frames_are_kept(folder: Path, media: Path, tmp_path: Path) -> None:
    """Up to the loss of writing the clip again."""
    known, _ = read_video(media / "nine.mp4")
    again, _ = read_video(write_video(tmp_path / "again.mp4", known, 6))
    loss = (again - known).abs().mean()

    def made(*options: str) -> torch.Tensor:
        generate.main(command(folder, tmp_path / "a.mp4", *options))
        return read_video(tmp_path / "a.mp4")[0]

    clip = str(media / "nine.mp4")
    for part, same in (
        (made("--extend", clip)[:, :9], known),
        (made("--extend", clip, "--direction", "backward")[:, 9:], known),
        (made("--connect", clip, clip)[:, 18:], known),
        (made("--fill", clip, "--frames-mask", "3:5")[:, 5:], known[:, 5:]),
        (made("--super-resolve", clip, "--factor", "2")[:, ::2], known),
    ):
        assert (part - same).abs().mean() < 1.5 * loss
    unpasted = made("--super-resolve", clip, "--factor", "2", "--no-paste")[:, ::2]
    assert (unpasted - known).abs().mean() > 2 * loss


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_does_not_grow_with_the_times(
    folder: Path,
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
) -> None:
    """Of 20 extensions, the one that is written and the one that is made are all that is alive;
    those that come first wait on disk."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def make(stack: object, jobs: list, sampling: object, progress: object) -> list[torch.Tensor]:
        alive.append(sum(clip() is not None for clip in made))
        clip = torch.full((3, 5, 16, 24), len(made) / 10 - 1)
        made.append(weakref.ref(clip))
        return [clip]

    monkeypatch.setattr(modes, "run", make)
    generate.main(command(folder, tmp_path / "a.mp4", "--extend", str(media / "nine.mp4"),
                          "--times", "20", "--frames", "5", "--direction", direction))  # fmt: skip
    assert len(made) == 20 and max(alive) <= 1
    video, _ = read_video(tmp_path / "a.mp4")
    assert video.shape == (3, 109, 16, 24)
    new = video[:, 9:] if direction == "forward" else video[:, :-9].flip(1)
    grey = new.mean((0, 2, 3)).view(20, 5).mean(1)  # in the order in which they were made
    torch.testing.assert_close(grey, torch.arange(20) / 10 - 1, rtol=0, atol=0.03)


def test_windows_of_a_long_clip_are_made_a_few_at_a_time(
    folder: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    run = modes.run

    def counted(stack: Stack, jobs: list, *rest: Any) -> list[torch.Tensor]:
        packs.append(len(jobs))
        return run(stack, jobs, *rest)

    monkeypatch.setattr(modes, "run", counted)
    options = ["--super-resolve", str(media / "three.mp4"), "--factor", "12"]

    def made(name: str) -> torch.Tensor:
        generate.main(command(folder, tmp_path / name, *options))
        return read_video(tmp_path / name)[0]

    whole = made("whole.mp4")
    monkeypatch.setattr(generate, "PACK", 1)
    parts = made("parts.mp4")
    assert packs == [2, 1, 1] and whole.shape == (3, 25, 16, 24)
    assert (whole - parts).abs().mean() < 0.01  # a window does not depend on its pack


def test_the_seed_decides(folder: Path) -> None:
    stack, few = load_stack(folder), Sampling(steps=2)

    def make(seed: int) -> torch.Tensor:
        job = modes.text_to_video(PROMPT, Size(32, 32, 5), seed)
        return modes.run(stack, [job], few)[0]

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
        (["--image", "{m}/nine.mp4"], ValueError, "not a readable picture"),
        (["--image", "{m}/first.png", "--size", "32x32"], ValueError, "input, 24x16, got 32x32"),
        (["--image", "{m}/first.png", "--frames", "1"], ValueError, "2 or more"),
        (["--extend", "{m}/three.mp4"], ValueError, "at least 5 frames, got 3"),
        (["--extend", "{m}/sound.mp4"], ValueError, "no video stream"),
        (["--extend", "{m}/empty.mp4"], ValueError, "not a readable video"),
        (["--connect", "{m}/nine.mp4", "{m}/three.mp4"], ValueError, "at least 5 frames, got 3"),
        (["--connect", "{m}/nine.mp4", "{m}/other.mp4"], ValueError, "24x16 and 16x16"),
        (["--fill", "{m}/nine.mp4"], ValueError, "--frames-mask: expected START:STOP"),
        (["--fill", "{m}/nine.mp4", "--frames-mask", "4:12"], ValueError, "9 frames, got 4:12"),
        (["--fill", "{m}/nine.mp4", "--frames-mask", "0:9"], ValueError, "part of the clip"),
        (["--super-resolve", "{m}/one.mp4"], ValueError, "at least 2 frames, got 1"),
        (["--super-resolve", "{m}/nine.mp4", "--factor", "1"], ValueError, "factor: expected"),
        (["--edit", "{m}/nine.mp4", "--strength", "0"], ValueError, "strength: expected"),
        (["--edit", "{m}/nine.mp4", "--strength", "1.5"], ValueError, "strength: .*got 1.5"),
        (["--edit", "{m}/nine.mp4", "--frames", "5"], ValueError, "--frames: follows the clip"),
        (["--strength", "0.5"], ValueError, "--strength: expected only with --edit"),
        (["--frames-mask", "1:2"], ValueError, "--frames-mask: expected only with --fill"),
        (["--loop", "--frames", "9"], ValueError, "4, 8, 12, ... frames, got 9"),
        (["--frames", "99999"], ValueError, "frames: expected 1 to"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path,
    media: Path,
    tmp_path: Path,
    change: list[str],
    error: type[Exception],
    message: str,
) -> None:
    arguments = command(folder, tmp_path / "a.mp4")
    change = [text.format(m=media) for text in change]
    if not change[0].startswith("-"):
        arguments[0] = change[0]
        change = []
    with pytest.raises(error, match=message):
        generate.main([*arguments, *change])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        ["--size", "huge"], ["--frames", "0"], ["--steps", "x"], ["--loop", "--image", "a.png"],
        ["--extend", "a.mp4", "--direction", "up"], ["--fill", "a.mp4", "--frames-mask", "4"],
    ],
)  # fmt: skip
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


# --- pictures ------------------------------------------------------------------------------------


def test_the_sheet_has_a_row_for_every_mode(folder: Path, tmp_path: Path) -> None:
    drawn = modes_sheet.rows(0)
    assert len({row.title for row in drawn}) == len(drawn) == 10
    out = tmp_path / "new" / "sheet.png"
    modes_sheet.main(["-o", str(out), "--checkpoint", str(folder), "--steps", "1"])
    assert np.asarray(Image.open(out)).std() > 10
    (row,) = [row for row in drawn if row.title == "connect"]
    frames = modes_sheet.strip(row, torch.zeros(3, 9, 32, 32))
    assert [known for _, known in frames] == [True] * 3 + [False] * 9 + [True] * 3
