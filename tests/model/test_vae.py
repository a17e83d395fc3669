"""The video VAE: shapes, causality, streaming, padding, checkpoints, and an exactly resumed run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from model import train_vae
from model.config import VAES, WORLDS, VAEConfig, WorldConfig
from model.optim import Muon, orthogonalise
from model.train_vae import Run, TrainConfig, main, psnr, validation
from model.vae import VideoVAE, latent_shape, load_vae, save_vae

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model" / "checkpoints" / "tiny"
SMALL = VAEConfig(widths=(16, 24), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
WORLD = WorldConfig(frames=((5, 0.7), (1, 0.3)))


def random_vae(dtype: torch.dtype = torch.float32) -> VideoVAE:
    """Every weight random: nothing hides behind a layer that starts at zero."""
    torch.manual_seed(0)
    vae = VideoVAE(SMALL)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vae.to(dtype).requires_grad_(False).eval()


def video(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


@pytest.mark.parametrize(
    ("size", "latent"),
    [((1, 16, 16), (1, 2, 2)), ((5, 16, 24), (2, 2, 3)), ((7, 17, 23), (3, 3, 3)),
     ((9, 8, 40), (3, 1, 5)), ((2, 3, 5), (2, 1, 1))],
)  # fmt: skip
def test_any_size_is_padded_and_cropped_back(
    size: tuple[int, int, int], latent: tuple[int, int, int]
) -> None:
    vae, clip = random_vae(), video(2, 3, *size)
    z = vae.encode(clip)
    assert z.shape == (2, 16, *latent) and latent_shape(*size) == latent
    assert vae.decode(z, size).shape == clip.shape
    assert torch.equal(vae.decode(z, size), vae.decode(z)[:, :, : size[0], : size[1], : size[2]])


def test_padding_repeats_the_last_frame_row_and_column() -> None:
    vae, clip = random_vae(), video(1, 3, 6, 15, 10)
    padded = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, 3, -1, -1)], 2)
    padded = torch.cat([padded, padded[:, :, :, -1:]], 3)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, -1, 6)], 4)
    assert torch.equal(vae.encode(clip), vae.encode(padded))


def test_causal_an_image_is_the_first_frame_of_a_video() -> None:
    vae, clip = random_vae(torch.float64), video(1, 3, 9, 16, 16, dtype=torch.float64)
    z = vae.encode(clip)
    torch.testing.assert_close(vae.encode(clip[:, :, :1]), z[:, :, :1], rtol=0, atol=1e-12)
    changed = clip.clone()
    changed[:, :, 5:] = 0  # frames of the last latent
    assert torch.allclose(vae.encode(changed)[:, :, :2], z[:, :, :2], rtol=0, atol=1e-12)
    assert float((vae.encode(changed)[:, :, 2] - z[:, :, 2]).abs().max()) > 1e-3
    later = z.clone()
    later[:, :, 2] = 0
    torch.testing.assert_close(
        vae.decode(later)[:, :, :5], vae.decode(z)[:, :, :5], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "chunks", [[17], [1] * 17, [1, 4, 4, 8], [5, 12], [3, 3, 3, 3, 5], [2, 15]]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_encode_stream_equals_one_shot(chunks: list[int], dtype: torch.dtype, bound: float) -> None:
    vae, clip = random_vae(dtype), video(1, 3, 17, 24, 16, dtype=dtype)
    whole = vae.encode(clip)
    parts = torch.cat(list(vae.encode_stream(clip.split(chunks, 2))), 2)
    assert parts.shape == whole.shape
    assert float((parts - whole).abs().max()) <= bound * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("chunks", [[5], [1] * 5, [2, 3], [1, 4], [3, 1, 1]])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_decode_stream_equals_one_shot(chunks: list[int], dtype: torch.dtype, bound: float) -> None:
    vae = random_vae(dtype)
    z = vae.encode(video(1, 3, 17, 24, 16, dtype=dtype))
    whole = vae.decode(z)
    parts = list(vae.decode_stream(z.split(chunks, 2)))
    assert [part.shape[2] for part in parts] == [
        4 * n - (3 if i == 0 else 0) for i, n in enumerate(chunks)
    ]
    assert float((torch.cat(parts, 2) - whole).abs().max()) <= bound


def test_encode_stream_pads_an_unfinished_end_like_one_shot() -> None:
    vae, clip = random_vae(), video(1, 3, 7, 16, 20)
    parts = torch.cat(list(vae.encode_stream(clip.split([3, 4], 2))), 2)
    torch.testing.assert_close(parts, vae.encode(clip), rtol=0, atol=1e-6)
    assert list(vae.encode_stream([])) == []


@pytest.mark.parametrize(
    "bad", [video(3, 5, 16, 16), video(1, 4, 5, 16, 16), video(1, 3, 0, 16, 16)]
)
def test_bad_videos_raise(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="video: expected"):
        random_vae().encode(bad)


def test_bad_latents_raise() -> None:
    with pytest.raises(ValueError, match="latent: expected"):
        random_vae().decode(torch.zeros(1, 8, 1, 2, 2))
    with pytest.raises(ValueError, match="latent: expected"):
        random_vae().decode(torch.zeros(1, 16, 1, 2, 2, dtype=torch.int32))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    vae = random_vae()
    vae.scale.fill_(0.75)
    save_vae(vae, tmp_path)
    back, clip = load_vae(tmp_path), video(1, 3, 5, 16, 16)
    assert float(back.scale) == 0.75 and next(back.parameters()).dtype == torch.float32
    torch.testing.assert_close(back.encode(clip), vae.encode(clip), rtol=0.01, atol=0.01)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["vae.json", "vae.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_bad_checkpoints_raise(tmp_path: Path, damage: str) -> None:
    path = save_vae(random_vae(), tmp_path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        config = json.loads((tmp_path / "vae.json").read_text())
        (tmp_path / "vae.json").write_text(json.dumps(config | {"widths": [16, 32]}))
    with pytest.raises(ValueError, match="vae.safetensors"):
        load_vae(tmp_path)


def test_orthogonalise_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 100), (100, 24), (24, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert float(values.max()) < 1.25
        assert float(values.median()) > 0.6
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def make_run(steps: int = 12) -> Run:
    return Run(TrainConfig(steps=steps, stage1=0.5, batch=2, warmup=2), SMALL, WORLD)


def test_training_lowers_the_error_and_freezes_the_encoder() -> None:
    run = make_run(40)
    first = [run.train_step()["mse"] for _ in range(20)]
    run.freeze_encoder()
    encoder = [p.clone() for p in run.vae.encoder.parameters()]
    second = [run.train_step()["mse"] for _ in range(20)]
    assert sum(second[-5:]) < 0.6 * sum(first[:5])
    assert all(
        torch.equal(a, b) for a, b in zip(encoder, run.vae.encoder.parameters(), strict=True)
    )
    latents = run.finished().encode(torch.stack(validation(WORLD, 1)))
    assert 0.3 < float(latents.square().mean().sqrt()) < 3


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_gives_the_same_bits(tmp_path: Path, stop: int) -> None:
    straight, cut = make_run(), make_run()
    for run, until in ((straight, 12), (cut, stop)):
        while run.step < until:
            run.train_step()
            if run.step == run.boundary:
                run.freeze_encoder()
    cut.save(tmp_path / "state.pt")
    resumed = Run.load(tmp_path / "state.pt")
    while resumed.step < 12:
        resumed.train_step()
        if resumed.step == resumed.boundary:
            resumed.freeze_encoder()
    for a, b in zip(
        straight.finished().state_dict().values(), resumed.finished().state_dict().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_a_damaged_state_raises(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError, match="state.pt"):
        Run.load(tmp_path / "state.pt")


def test_command_errors_name_the_option(tmp_path: Path) -> None:
    for options, message in (
        (["--resume"], "--resume: .* does not exist"),
        (["--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--minutes", "nan"], "--minutes: expected a positive number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--out", str(tmp_path), *options])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_middle_of_a_step_leaves_a_state_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VAES, "tiny", SMALL)
    monkeypatch.setitem(WORLDS, "vae", WORLD)
    batch_of, calls = train_vae.batch_of, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return batch_of(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "batch_of", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(["--steps", "6", "--out", str(tmp_path), "--quiet"])
    assert "--resume" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["vae_state.pt"]
    assert Run.load(tmp_path / "vae_state.pt").step == 3  # the step was finished
    main(["--out", str(tmp_path), "--resume", "--quiet"])
    assert load_vae(tmp_path).encode(video(1, 3, 5, 16, 16)).shape == (1, 16, 2, 2, 2)
    names = {"vae_state.pt", "vae_loss.json", "vae_loss.png"}
    names |= {
        f"{name}.{kind}" for name in ("vae", "vae_stage1") for kind in ("json", "safetensors")
    }
    assert {item.name for item in tmp_path.iterdir()} == names


@pytest.mark.skipif(not (SHIPPED / "vae.safetensors").is_file(), reason="no checkpoint yet")
def test_the_shipped_vae_reconstructs_the_world() -> None:
    vae = load_vae(SHIPPED)
    assert (SHIPPED / "vae.safetensors").stat().st_size < 6_000_000
    promised = json.loads((ROOT / "model" / "results" / "vae.json").read_text())["world"]["psnr_db"]
    assert psnr(vae, validation(WorldConfig(), 12)) > promised - 2
