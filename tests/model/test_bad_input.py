"""What the commands say to bad input: one line on stderr, exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import evaluate, generate, modes, train_vae, vae
from model import train as training
from model.checkpoint import save_dit
from model.cli import run
from model.config import VAES, WORLDS, DiTConfig, VAEConfig, WorldConfig
from model.dit import DiT
from model.files import CheckpointError, cannot_write
from model.text import Vocabulary
from model.vae import VideoVAE, load_vae, save_vae
from model.world import VOCABULARY

PROMPT = "a red circle moving left"
SMALL = VAEConfig(widths=(16, 24), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("healthy")
    words = Vocabulary(VOCABULARY)
    config = DiTConfig(16, 1, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(words))
    save_dit(folder, DiT(config), words, {})
    save_vae(VideoVAE(SMALL), folder)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says before it exits with 2."""

    def call(module: ModuleType, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run("command", lambda _: module.main([str(text) for text in arguments]))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, said
        return said

    return call


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def not_a_number(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    save_file(tensors, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "dit.safetensors": (lambda path: cut(path, path.stat().st_size - 10), "is unreadable"),
    "dit.safetensors ": (lambda path: cut(path, 4), "is unreadable"),
    "dit.safetensors  ": (not_a_number, "that are not finite"),
    "dit.safetensors   ": (lambda path: save_file({"x": torch.ones(1)}, path), "does not fit"),
    "vae.safetensors": (lambda path: cut(path, path.stat().st_size // 2), "is unreadable"),
    "vae.safetensors ": (not_a_number, "that are not finite"),
    "vae.safetensors  ": (lambda path: save_file({"x": torch.ones(1)}, path), "does not fit"),
    "vae.json": (lambda path: cut(path, 20), "is unreadable"),
    "vae.json ": (lambda path: path.write_text("[]"), "describes no VAE"),
    "vae.json  ": (lambda path: path.write_text('{"widths": 3}'), "describes no VAE"),
    "config.json": (lambda path: cut(path, 40), "is unreadable"),
    "config.json ": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is unreadable"),
    "config.json  ": (lambda path: path.write_text("[]"), "describes no DiT"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(
    healthy: Path, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    folder = shutil.copytree(healthy, tmp_path / "checkpoint")
    damage, message = DAMAGE[name]
    damage(folder / name.strip())
    out = tmp_path / "a.mp4"
    out.write_text("old")
    said = refused(generate, PROMPT, "-o", out, "--checkpoint", folder)
    assert f"checkpoint: {folder / name.strip()} " in said and message in said
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("module", [generate, evaluate], ids=["generate", "evaluate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device: expected one that is here, got 'cuda:99' with"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2**31 - 1, got '-1'"),
        (["--seed", str(2**31)], "--seed: expected an integer from 0 to"),
        (["--steps", "0"], "--steps: expected an integer >= 1, got '0'"),
        (["--checkpoint", "nowhere"], "checkpoint: expected a file nowhere/config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_two_commands_share(
    tmp_path: Path,
    refused: Callable[..., str],
    module: ModuleType,
    options: list[str],
    message: str,
) -> None:
    start = [PROMPT, "-o"] if module is generate else ["--json"]
    assert message in refused(module, *start, tmp_path / "a.mp4", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YUV4MPEG2 W32 H32 F8:1 Ip A0:0 C420\n", "holds no frame"),
        (bytes(range(256)) * 8, "not a readable video"),
        (None, "no such file"),
    ],
    ids=["no frame", "noise", "folder"],
)
@pytest.mark.parametrize("option", ["--extend", "--edit", "--super-resolve"])
def test_files_without_pictures(
    tmp_path: Path,
    refused: Callable[..., str],
    option: str,
    content: bytes | None,
    message: str,
) -> None:
    clip = tmp_path / "clip"
    if content is None:
        clip.mkdir()
    else:
        clip.write_bytes(content)
    said = refused(generate, PROMPT, "-o", tmp_path / "a.mp4", option, clip)
    assert f"{clip}: {message}" in said and list(tmp_path.iterdir()) == [clip]


# --- full disks ----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("when", ["encoding", "signing"])
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_full_disk_keeps_what_was_there(
    healthy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    name: str,
    when: str,
) -> None:
    clip = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(modes, "run", lambda *_: [clip])
    out = tmp_path / name
    arguments = [PROMPT, "-o", out, "--checkpoint", healthy, "--frames", "1", "--quiet"]
    signed = []
    monkeypatch.setattr(generate, "sign", lambda path, about: signed.append(path.stat().st_size))
    generate.main([str(text) for text in arguments])
    monkeypatch.undo()
    monkeypatch.setattr(modes, "run", lambda *_: [clip])
    out.write_text("old")
    with files_of_at_most(signed[0] - 1 if when == "encoding" else signed[0] + 99):
        said = refused(generate, *arguments)
    assert f"--out: cannot write {out}: " in said and "too large; the file that was there" in said
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_no_space_is_called_a_full_disk(tmp_path: Path) -> None:
    error = OSError(28, "No space left on device")
    assert cannot_write(tmp_path / "x", error) == f"cannot write {tmp_path / 'x'}: the disk is full"


@pytest.mark.parametrize("fails", ["vae.safetensors", "vae.json"])
def test_both_files_of_a_vae_are_new_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The weights' scale stands in the other file."""
    torch.manual_seed(0)
    save_vae(VideoVAE(SMALL), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, value: object) -> None:
        raise CheckpointError(f"cannot write {path}: the disk is full")

    if fails == "vae.json":
        monkeypatch.setattr(vae, "write_json", full)
    with files_of_at_most(1000 if fails == "vae.safetensors" else 1 << 30):
        with pytest.raises(CheckpointError, match=f"cannot write .*{fails}"):
            save_vae(VideoVAE(SMALL), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    load_vae(tmp_path)


# --- runs that are resumed -----------------------------------------------------------------------


def test_a_run_is_not_begun_where_one_is(tmp_path: Path, refused: Callable[..., str]) -> None:
    for module, state, more in (
        (training, training.STATE, ["--config", "tiny"]),
        (train_vae, train_vae.STATE, []),
    ):
        out = tmp_path / module.__name__
        out.mkdir()
        (out / state).write_text("weeks of work")
        said = refused(module, *more, "--out", out)
        assert f"--out: {out} holds a run already; pass --resume or another --out" in said
        assert (out / state).read_text() == "weeks of work" and len(list(out.iterdir())) == 1


def test_the_vae_resumes_only_the_run_that_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(VAES, "tiny", SMALL)
    monkeypatch.setitem(WORLDS, "vae", WorldConfig(frames=((1, 1.0),)))
    begun = train_vae.Run(train_vae.TrainConfig(steps=2, seed=3), VAES["tiny"], WORLDS["vae"])
    begun.save(tmp_path / train_vae.STATE)
    before = (tmp_path / train_vae.STATE).read_bytes()
    again = ["--out", tmp_path, "--resume"]
    said = refused(train_vae, *again, "--steps", "3", "--seed", "4", "--world", "tiny")
    assert "--resume: expected the run as it began, got other --world, --steps, --seed" in said
    assert "--minutes" in refused(train_vae, *again, "--minutes", "3")
    assert (tmp_path / train_vae.STATE).read_bytes() == before
    options = train_vae.make_parser().parse_args(
        [*map(str, again), "--config", "tiny", "--world", "vae", "--steps", "2", "--seed", "3"]
    )
    assert train_vae.resumed(options).config == begun.config


def test_a_state_without_its_notes_is_none(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "state", {"config": json.dumps({})})
    with pytest.raises(CheckpointError, match="no state of a training, .*'step'"):
        training.restore(None, tmp_path / "state")  # type: ignore[arg-type]
    cut(tmp_path / "state", 30)
    with pytest.raises(CheckpointError, match="unreadable"):
        training.restore(None, tmp_path / "state")  # type: ignore[arg-type]
