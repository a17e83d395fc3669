"""Speed in the training's log: what is counted, by which denominators, and old logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model import speed
from model.budget import training_flops
from model.config import MODES, WORLDS, DiTConfig, TrainConfig
from model.data import LatentCache, build_cache, make_batch
from model.dit import DiT
from model.speed import Machine, datasheet_peak, matmul_rate, measure
from model.text import Vocabulary
from model.train import LOG, STATE, Trainer, restore, save, train
from model.training_log import Log, speed_of
from model.vae import VideoVAE
from model.world import VOCABULARY

WORDS = Vocabulary(VOCABULARY)
DIT = DiTConfig(
    16, 1, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(WORDS), base_tokens=48
)
TRAIN = TrainConfig("tiny", "tiny", clips=6, tokens=800, steps=3, warmup=2, modes="all")


@pytest.fixture(scope="module")
def cache() -> LatentCache:
    torch.manual_seed(0)
    with torch.no_grad():
        return build_cache(VideoVAE().encode, WORLDS["tiny"], MODES["all"], 6, 0, WORDS, 48)


def test_a_row_counts_operations_and_names_its_denominators(cache: LatentCache) -> None:
    batch = make_batch(cache, [0, 1], DIT, TRAIN, 0)
    log = Log(machine=Machine(matmul=12e9, peak=30e9))
    for flops in (4_000_000_000, 2_000_000_000):
        log.add(1.0, torch.ones(2), batch, 1.0, flops)
    row = log.close_row(2)
    assert row["flops_per_second"] == 3_000_000_000
    assert (row["matmul_share"], row["mfu"]) == (0.25, 0.1)
    assert speed_of(row).endswith("3 GFLOP/s (mfu 10.0%, matmul_share 25.0%)")
    log.machine = Machine(matmul=12e9)  # no datasheet, no MFU
    log.add(1.0, torch.ones(2), batch, 1.0, 1_200_000_000)
    row = log.close_row(3)
    assert row["matmul_share"] == 0.1 and "mfu" not in row


def test_training_counts_the_model_of_every_pack(cache: LatentCache, tmp_path: Path) -> None:
    run = Trainer(DiT(DIT), TRAIN, cache)
    packs = [make_batch(cache, run.packs[step], DIT, TRAIN, step) for step in range(3)]
    wanted = sum(training_flops(DIT, batch.layout.segments) for batch in packs)
    log = Log(machine=Machine(matmul=1e9))
    assert train(run, tmp_path, WORDS, log=log, quiet=True)
    (row,) = json.loads((tmp_path / LOG).read_text())["rows"]
    assert row["flops_per_second"] == pytest.approx(wanted / log.seconds, rel=1e-6)
    assert row["matmul_share"] == pytest.approx(row["flops_per_second"] / 1e9, abs=1e-4)


def test_a_log_from_before_is_continued(cache: LatentCache, tmp_path: Path) -> None:
    old = {"step": 1, "loss": 1.0, "loss_by_decile": [1.0] * 10, "clips": 3,
           "tokens_per_second": 9, "minutes": 0.1}  # fmt: skip
    run = Trainer(DiT(DIT), TRAIN, cache)
    run.advance()
    save(run, Log([old], 6.0), tmp_path, WORDS, "")
    again = Trainer(DiT(DIT), TRAIN, cache)
    log = restore(again, tmp_path / STATE)
    log.machine = Machine(1e9)
    assert train(again, tmp_path, WORDS, log=log, quiet=True)
    first, second = json.loads((tmp_path / LOG).read_text())["rows"]
    assert first == old and {"flops_per_second", "matmul_share"} <= second.keys()


def test_the_measured_rate_keeps_global_chance() -> None:
    torch.manual_seed(5)
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.0)
    wanted = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=wanted))
    assert 1e8 < rate < 1e15


def test_the_peak_is_that_of_the_datasheet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasheet_peak("NVIDIA H200", torch.bfloat16) == pytest.approx(989.4e12)
    assert datasheet_peak("NVIDIA H200", torch.float32) == pytest.approx(66.9e12)
    assert datasheet_peak("NVIDIA Nothing 1", torch.bfloat16) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert datasheet_peak("NVIDIA H200", torch.float32) is None  # TF32 is not in the table
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: 7e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert measure(torch.device("cuda"), torch.bfloat16) == Machine(7e12, 312e12)
    assert measure(torch.device("cpu")) == Machine(7e12)
