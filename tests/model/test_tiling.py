"""Tiles fit together exactly, and their halo is not larger than it must be."""

from __future__ import annotations

import pytest
import torch

from model import tiling
from model.config import VAEConfig
from model.tiling import decode_tiled, encode_tiled, halo, tiles
from model.vae import VideoVAE

SMALL = VAEConfig(latent_channels=4, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = VideoVAE(SMALL).double().eval()
    for parameter in vae.parameters():  # layers that start at zero would hide a wrong halo
        torch.nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    return vae


def test_halo_counts_the_convolutions(vae):
    assert halo(vae.decoder) == 4  # stem, 2 coarse blocks; a fine block and the head: 3 + 2 / 2
    assert halo(vae.encoder) == 4  # 2 coarse blocks, head; the stem and a fine block
    shipped = VideoVAE()
    assert (halo(shipped.decoder), halo(shipped.encoder)) == (7, 6)


@pytest.mark.parametrize(("tile", "chunk"), [((3, 5), 1), ((7, 4), 2), ((64, 64), 3)])
def test_decode_equals_one_shot(vae, tile, chunk):
    latent = torch.randn(2, 4, 3, 13, 14, dtype=torch.float64) * 0.5
    whole = vae.decode(latent)
    assert 0.05 < whole.std() and (whole.abs() < 1).double().mean() > 0.9
    torch.testing.assert_close(decode_tiled(vae, latent, tile, chunk), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tile", "chunk"), [((3, 5), 1), ((64, 64), 2)])
def test_encode_equals_one_shot(vae, tile, chunk):
    video = torch.rand(1, 3, 7, 13 * 8 - 3, 80, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(
        encode_tiled(vae, video, tile, chunk), vae.encode(video), rtol=0, atol=1e-12
    )


def test_a_smaller_halo_would_not_do(vae, monkeypatch):
    latent = torch.randn(1, 4, 1, 12, 12, dtype=torch.float64)
    video = torch.rand(1, 3, 1, 96, 96, dtype=torch.float64) * 2 - 1
    monkeypatch.setattr(tiling, "halo", lambda side: halo(side) - 1)
    assert (decode_tiled(vae, latent, (6, 6)) - vae.decode(latent)).abs().max() > 1e-9
    assert (encode_tiled(vae, video, (6, 6)) - vae.encode(video)).abs().max() > 1e-9


def test_tiles_cover_once():
    for length, tile in [(1, 4), (8, 4), (9, 4), (3, 1)]:
        cut = tiles(length, tile, 2)
        assert [i for t in cut for i in range(t.start, t.stop)] == list(range(length))
        assert all(
            t.outer_start == max(0, t.start - 2) and t.outer_stop == min(length, t.stop + 2)
            for t in cut
        )


def test_bad_input(vae):
    with pytest.raises(ValueError, match="tile: expected at least 1 latent, got 0"):
        decode_tiled(vae, torch.zeros(1, 4, 1, 2, 2), (0, 4))
    with pytest.raises(ValueError, match="chunk: expected at least 1 latent frame, got 0"):
        decode_tiled(vae, torch.zeros(1, 4, 1, 2, 2), chunk=0)
    with pytest.raises(ValueError, match=r"latent: expected \[B, C, t, h, w\]"):
        decode_tiled(vae, torch.zeros(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"video: expected \[B, 3, T, H, W\]"):
        encode_tiled(vae, torch.zeros(3, 1, 16, 16))
