"""Training: exact resume, interruption, refusals, and that it learns at all."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from model import train as training
from model.checkpoint import CheckpointError, load_dit, read_tensors
from model.condition import Given, GivenClip
from model.config import MODES, WORLDS, DiTConfig, TrainConfig
from model.data import (
    LatentCache,
    Packs,
    build_cache,
    cache_key,
    load_cache,
    make_batch,
    save_cache,
    some_of,
)
from model.dit import DiT
from model.draw import draw, way_back_is_held_out
from model.files import write_beside
from model.text import NO_PROMPT, Vocabulary
from model.vae import VideoVAE
from model.world import DIRECTIONS, HELD_OUT, VOCABULARY, Wanted, parse, sample_scene

WORDS = Vocabulary(VOCABULARY)
DIT = DiTConfig(
    16, 2, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(WORDS), base_tokens=48
)
TRAIN = TrainConfig("tiny", "tiny", clips=24, tokens=800, steps=6, warmup=2, modes="all")
CONFIGS = [TRAIN, dataclasses.replace(TRAIN, muon=0.02)]


@pytest.fixture(scope="module")
def cache() -> LatentCache:
    torch.manual_seed(0)
    with torch.no_grad():
        return build_cache(VideoVAE().encode, WORLDS["tiny"], MODES["all"], 24, 0, WORDS, 48)


def trainer(cache: LatentCache, config: TrainConfig = TRAIN) -> training.Trainer:
    torch.manual_seed(0)
    return training.Trainer(DiT(DIT), config, cache)


@pytest.mark.parametrize("config", CONFIGS, ids=["adamw", "muon"])
def test_resume_gives_the_same_bits(
    cache: LatentCache, tmp_path: Path, config: TrainConfig
) -> None:
    whole = trainer(cache, config)
    assert training.train(whole, tmp_path / "whole", WORDS, quiet=True)
    first = trainer(cache, config)
    for _ in range(3):
        first.advance()
    training.save(first, training.Log(), tmp_path / "halves", WORDS, "")
    torch.manual_seed(99)
    second = training.Trainer(DiT(DIT), config, cache)
    log = training.restore(second, tmp_path / "halves" / training.STATE)
    assert second.step == 3
    assert training.train(second, tmp_path / "halves", WORDS, log=log, quiet=True)
    ours, theirs = whole.state(), second.state()
    assert ours.keys() == theirs.keys() and any(".blocks.0.qkv" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    a, _ = read_tensors(tmp_path / "whole" / "dit.safetensors")
    b, _ = read_tensors(tmp_path / "halves" / "dit.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_refuses_another_config(cache: LatentCache, tmp_path: Path) -> None:
    training.save(trainer(cache), training.Log(), tmp_path, WORDS, "")
    other = trainer(cache, dataclasses.replace(TRAIN, steps=9))
    with pytest.raises(CheckpointError, match="steps 6 -> 9"):
        training.restore(other, tmp_path / training.STATE)


def test_interruption_saves_a_state_to_resume_from(
    cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(cache)
    advance = run.advance
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background

    def interrupted() -> tuple:
        result = advance()
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(run, "advance", interrupted)
    assert not training.train(run, tmp_path, WORDS, quiet=True)
    second = trainer(cache)
    training.restore(second, tmp_path / training.STATE)
    assert second.step == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_keeps_the_old_checkpoint(cache: LatentCache, tmp_path: Path) -> None:
    run = trainer(cache)
    training.save(run, training.Log(), tmp_path, WORDS, "")
    before = (tmp_path / training.STATE).read_bytes()
    run.advance()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*train_state.* is kept"):
            training.save(run, training.Log(), tmp_path, WORDS, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / training.STATE).read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def test_no_space_is_called_a_full_disk(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full"):
        write_beside(tmp_path / "x", full)


def test_it_learns(cache: LatentCache) -> None:
    """Eight clips by heart: a model that ignores them predicts the noise alone and stays near 1."""
    config = dataclasses.replace(TRAIN, steps=40, warmup=5, learning_rate=1e-2)
    run = trainer(cache, config)
    losses = [float(run.advance()[0]) for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_saved_model_loads_and_predicts(cache: LatentCache, tmp_path: Path) -> None:
    run = trainer(cache)
    assert training.train(run, tmp_path, WORDS, quiet=True, command="the command")
    model, words = load_dit(tmp_path)
    assert words.words == WORDS.words and model.config == DIT
    batch = make_batch(cache, [0, 1], DIT, TRAIN, 0)
    with torch.no_grad():
        a = model(batch.inputs, batch.layout, batch.words, batch.times)
        b = run.averaged()(batch.inputs, batch.layout, batch.words, batch.times)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0.02)  # fp16 weights
    log = json.loads((tmp_path / "dit_loss.json").read_text())
    assert log["command"] == "the command" and log["rows"][-1]["step"] == 6
    assert len(log["rows"][-1]["loss_by_decile"]) == 10
    assert (tmp_path / "dit_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "config.json").read_text())["training"]["step"] == 6


def test_a_run_may_start_from_another_model(cache: LatentCache, tmp_path: Path) -> None:
    run = trainer(cache)
    run.advance()
    training.save(run, training.Log(), tmp_path, WORDS, "")
    model = DiT(DIT)
    training.start_from(model, WORDS, tmp_path)
    for ours, theirs in zip(model.parameters(), run.average, strict=True):
        torch.testing.assert_close(ours.data, theirs, rtol=1e-3, atol=1e-4)  # stored in fp16
    with pytest.raises(ValueError, match="--init: expected"):
        training.start_from(DiT(dataclasses.replace(DIT, depth=1)), WORDS, tmp_path)


def test_load_refuses_what_is_no_checkpoint(cache: LatentCache, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        load_dit(tmp_path)
    training.save(trainer(cache), training.Log(), tmp_path, WORDS, "")
    file = tmp_path / "dit.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="unreadable"):
        load_dit(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="describes no DiT"):
        load_dit(tmp_path)


# --- data ----------------------------------------------------------------------------------------


def test_cache_round_trip_and_its_key(cache: LatentCache, tmp_path: Path) -> None:
    key = cache_key(WORLDS["tiny"], MODES["all"], 24, 0, WORDS, "abc")
    save_cache(tmp_path / "c", cache, key)
    again = load_cache(tmp_path / "c", key)
    assert again is not None and len(again) == 24
    for index in range(24):
        assert torch.equal(again.latent(index), cache.latent(index))
        assert again.caption(index, True) == cache.caption(index, True)
        for ours, theirs in zip(again.given(index), cache.given(index), strict=True):
            assert torch.equal(ours.latent, theirs.latent)
            assert (ours.time, ours.step) == (theirs.time, theirs.step)
    assert load_cache(tmp_path / "c", {**key, "vae": "other"}) is None
    assert load_cache(tmp_path / "none", key) is None


def test_batches_are_a_function_of_seed_and_step(cache: LatentCache) -> None:
    clips = list(range(24))
    a, b, other = (make_batch(cache, clips, DIT, TRAIN, step) for step in (5, 5, 6))
    assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    assert torch.equal(a.words, b.words) and torch.equal(a.times, b.times)
    assert not torch.equal(a.times, other.times)


def test_batches_hold_clean_given_parts_and_noisy_targets(cache: LatentCache) -> None:
    config = dataclasses.replace(TRAIN, drop=0.0, no_prompt=1.0)
    batch = make_batch(cache, list(range(24)), DIT, config, 0)
    assert set(batch.words.tolist()) == {NO_PROMPT}
    given = [x for x, wanted in zip(batch.inputs, batch.wanted, strict=True) if wanted is None]
    expected = [part.latent for index in range(24) for part in cache.given(index)]
    assert len(given) > 12
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.equal(ours, theirs)
    mains = [
        (x, wanted, owner)
        for x, wanted, owner in zip(batch.inputs, batch.wanted, batch.owners, strict=True)
        if wanted is not None
    ]
    assert [owner for *_, owner in mains] == list(range(24))
    for x, wanted, owner in mains:
        x0 = cache.latent(owner)
        torch.testing.assert_close(x - batch.times[owner] * wanted, x0, rtol=0, atol=1e-5)
    assert batch.layout.num_tokens <= cache.tokens(DIT.patch).sum()


def test_given_parts_are_left_out_but_never_all() -> None:
    given, rng = (
        [Given(torch.zeros(1, 1, 1, 1), time) for time in range(4)],
        np.random.default_rng(0),
    )
    counts = [len(some_of(given, 0.5, rng)) for _ in range(200)]
    assert min(counts) == 1 and max(counts) == 4
    assert some_of(given, 0.0, rng) == given and some_of([], 0.5, rng) == []


def test_examples_show_every_mode() -> None:
    """What is given lies where its times say: beside or inside the clip, in one motion."""
    modes = MODES["all"]
    for name, _ in modes:
        examples = [draw(index, 3, WORLDS["tiny"], ((name, 1.0),)) for index in range(12)]
        for example in examples:
            frames = example.video.shape[1]
            spans = [(part.time, part.time + part.video.shape[1]) for part in example.given]
            if name in ("forward", "connect"):
                assert spans[0] in ((-5, 0), (-9, 0))
            if name in ("backward", "connect"):
                assert spans[-1] in ((frames, frames + 5), (frames, frames + 9))
            if name in ("image", "fill", "frame"):
                for part in example.given:
                    at = int(part.time)
                    assert torch.equal(part.video, example.video[:, at : at + 1])
                    assert name != "image" or at == 0
                assert frames == 1 or len(spans) in ((2, 3, 4, 5, 6) if name == "fill" else (1,))
            if name == "none":
                assert not example.given
            assert all(part.video.shape[2:] == example.video.shape[2:] for part in example.given)
        joints = [  # the step over a seam is no larger than the largest step on either side
            (part, example.video)
            for example in examples
            for part in example.given
            if name in ("forward", "backward")
        ]
        for part, video in joints:
            both = [part.video, video] if part.time < 0 else [video, part.video]
            whole = torch.cat(both, 1)
            steps = (whole[:, 1:] - whole[:, :-1]).abs().mean((0, 2, 3))
            seam = both[0].shape[1] - 1
            around = torch.cat([steps[:seam], steps[seam + 1 :]])
            assert steps[seam] <= 1.3 * around.max() + 1e-6
    first, again = (draw(7, 3, WORLDS["tiny"], modes) for _ in range(2))
    assert torch.equal(first.video, again.video) and first.captions == again.captions
    assert all(isinstance(part, GivenClip) for part in first.given)


def test_loops_end_where_they_begin() -> None:
    """A batch holds the clip's copies at its own time; no way back shows what is held out."""
    shape, colour, direction = sorted(HELD_OUT)[0]
    names = list(DIRECTIONS)
    for turn, held_out in ((4, True), (0, False), (2, False)):
        heading = names[(names.index(direction) + turn) % 8]
        want = Wanted(shape, colour, heading)
        scene = sample_scene(np.random.default_rng(0), kind="one", frames=9, wanted=want)
        assert way_back_is_held_out(scene) == held_out
    modes = (("loop", 1.0),)
    examples = [draw(index, 1, WORLDS["tiny"], modes) for index in range(40)]
    for example in examples:
        assert example.loop and example.video.shape[1] == 17
        assert torch.equal(example.video[:, 0], example.video[:, -1])
        assert torch.equal(example.video[:, 5:9], example.video[:, :4].flip(1))  # turns at 4
        (want,) = parse(example.captions[0])[:1]
        if "bouncing" in example.captions[0]:
            assert want.direction is None and "moving" not in example.captions[1]
    assert sum("bouncing" in example.captions[0] for example in examples) > 20
    with torch.no_grad():
        cache = build_cache(VideoVAE().encode, WORLDS["tiny"], modes, 4, 1, WORDS, 48)
    batch = make_batch(cache, [0, 1, 2, 3], DIT, TRAIN, 0)
    assert [wanted is None for wanted in batch.wanted] == [True, True, False] * 4
    for clip in range(4):
        before, behind, x = batch.inputs[3 * clip : 3 * clip + 3]
        assert torch.equal(before, x[:, 1:]) and torch.equal(behind, x[:, 1:])
    longest = torch.maximum(*cache.word_counts.T).sum() - len(batch.words)
    assert cache.tokens(DIT.patch).sum() == batch.layout.num_tokens + longest


def test_captions_of_parts_of_a_bouncing_scene_name_no_heading() -> None:
    forward = (("forward", 1.0),)
    captions = [draw(index, 0, WORLDS["tiny"], forward).captions for index in range(30)]
    bouncing = [pair for pair in captions if "bouncing" in pair[0]]
    assert len(bouncing) > 3
    assert all("moving" not in short and "moving" in detailed for short, detailed in bouncing)


def test_packs_show_every_clip_once_an_epoch(cache: LatentCache) -> None:
    tokens = cache.tokens(DIT.patch)
    packs = Packs(tokens, 800, 16, 3)
    seen: list[int] = []
    number = 0
    while len(seen) < 24:
        assert tokens[packs[number]].sum() <= 800
        seen += packs[number]
        number += 1
    assert sorted(seen) == list(range(24))
    assert packs[number] and Packs(tokens, 800, 16, 3)[number] == packs[number]
    assert Packs(tokens, 800, 16, 4)[0] != packs[0]
    tight = Packs(tokens, int(tokens.max()), 16, 3)  # no room for four large clips
    assert sorted(i for step in range(len(tight._epoch(0))) for i in tight[step]) == list(range(24))
    with pytest.raises(ValueError, match="tokens: expected"):
        Packs(tokens, 10, 16, 3)


# --- command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nope"], "--config: expected one of"),
        (["--config", "tiny", "--minutes", "-1"], "--minutes"),
        (["--config", "tiny", "--out", "{tmp}", "--resume"], "--resume: found no"),
        (["--config", "tiny", "--out", "{tmp}", "--vae", "{tmp}"], "expected a VAE checkpoint"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.main([text.format(tmp=tmp_path) for text in arguments])
    assert list(tmp_path.iterdir()) == []


def test_parser_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        training.main(["--config", "tiny", "--steps", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
