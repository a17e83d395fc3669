"""The studies compare what they say they compare, resume, and report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from model.config import DITS, TrainConfig
from model.data import make_batch
from model.dit import DiT
from model.stack import CHECKPOINT
from model.studies import native, packing, runs
from model.studies.__main__ import main
from model.studies.looking import Validation, asks, attributes, framed
from model.text import Vocabulary
from model.train import Trainer, batch_loss, packed_velocity
from model.vae import load_vae
from model.world import VOCABULARY, clip

CLIPS = 40


@pytest.fixture(scope="module")
def vae():
    return load_vae(CHECKPOINT)


@pytest.fixture(scope="module")
def cache(vae):
    return packing.caches(vae, 0, CLIPS)


def small_dit(seed: int = 0) -> DiT:
    """The tiny model, shallow, with random numbers where adaLN-Zero has zeros."""
    torch.manual_seed(seed)
    model = DiT(replace(DITS["tiny"], depth=2, vocabulary=len(Vocabulary(VOCABULARY))))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.1)
    return model


@pytest.mark.parametrize("way", ["plain_packed", "plain_bucketed", "plain_loop", "plain_padded"])
def test_every_way_gives_the_loss_and_gradients_of_the_packed_one(cache, way) -> None:
    model = small_dit()
    batch = make_batch(cache, list(range(9)), model.config, packing.CONFIG, 0)
    assert len({tuple(x.shape) for x in batch.inputs}) > 3
    found = []
    for velocity in (packed_velocity, packing.plain_velocity(way)):
        model.zero_grad()
        loss, per_clip = batch_loss(model, batch, velocity)
        loss.backward()
        found.append((loss.detach(), per_clip, [p.grad.clone() for p in model.parameters()]))
    (loss, per_clip, grads), (other, others, other_grads) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_clip, others, rtol=1e-4, atol=1e-5)
    for grad, wanted in zip(grads, other_grads, strict=True):
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7


def test_buckets_hold_one_size_and_every_clip_once_an_epoch(cache) -> None:
    tokens = cache.tokens((1, 1, 1))
    buckets = packing.Buckets(cache, tokens, 400, seed=3)
    seen: list[int] = []
    number = 0
    while len(seen) < CLIPS:
        pack = buckets[number]
        assert len({tuple(cache.shapes[k].tolist()) for k in pack}) == 1
        assert len(pack) == 1 or tokens[pack].sum() <= 400
        seen += pack
        number += 1
    assert sorted(seen) == list(range(CLIPS))
    again = packing.Buckets(cache, tokens, 400, seed=3)
    assert again[number + 2] == buckets[number + 2]  # of the next epoch, asked for directly


def test_captions_have_equal_lengths_and_some_say_nothing(vae) -> None:
    cache = packing.caches(vae, 1, CLIPS)
    assert cache.word_counts.unique().tolist() == [packing.WORDS]
    captions = [cache.caption(k, False) for k in range(CLIPS)]
    silent = sum(not any(caption) for caption in captions)
    assert 0 < silent < CLIPS // 3
    vocabulary = Vocabulary(VOCABULARY)
    for k in range(CLIPS):  # every clip has kept its own words
        words = vocabulary.encode(clip(k, "train", 1, packing.WORLD).short, 48)
        assert captions[k] in ([0] * packing.WORDS, words + [0] * (packing.WORDS - len(words)))


def test_centre_square() -> None:
    video = torch.arange(4 * 8).view(1, 1, 1, 4, 8)
    assert torch.equal(native.centre_square(video), video[..., 2:6])
    assert torch.equal(native.centre_square(video.mT), video.mT[..., 2:6, :])


def test_an_object_that_leaves_the_frame_is_not_framed() -> None:
    wanted = asks(native.WORLD, native.OTHERS, 9, 4)
    true = [ask.video for ask in wanted]
    assert framed(wanted, true)["framed"] == 1
    assert attributes(wanted, true) == {"all": 1.0, "each": 1.0}
    for ask in wanted:  # the view is moved so that its border goes through the object
        height, width = ask.video.shape[2:]
        x, y = ask.scene.objects[0].path[4]
        away = (round(y), 0) if height >= width else (0, round(x))
        moved = torch.full_like(ask.video, -0.88)
        moved[:, :, : height - away[0], : width - away[1]] = ask.video[:, :, away[0] :, away[1] :]
        assert framed([ask], [moved])["framed"] == 0
    noise = [torch.rand_like(video) * 2 - 1 for video in true]
    assert framed(wanted, noise)["framed"] == 0


def test_validation_is_the_same_for_the_same_weights(cache) -> None:
    seen = Validation(cache, 400, 2)
    with torch.no_grad():
        first, again, other = seen(small_dit()), seen(small_dit()), seen(small_dit(1))
    assert first == again != other


def test_a_stopped_run_resumes_with_the_same_numbers(cache, tmp_path) -> None:
    config = TrainConfig("tiny", "packing", CLIPS, 400, steps=6, warmup=1, no_prompt=0.0, seed=0)

    def arm(look) -> runs.Arm:
        return runs.Arm("a", "A", lambda seed: Trainer(small_dit(), config, cache), look, (2, 5),
                        in_steps=True)  # fmt: skip

    def look(model: DiT) -> runs.Row:
        return {"sum": float(sum(p.double().abs().sum() for p in model.parameters()))}

    def stop_at_the_second(model: DiT) -> runs.Row:
        if (tmp_path / "b" / runs.STATE).exists():
            raise KeyboardInterrupt
        return look(model)

    whole = runs.run(arm(look), 0, tmp_path / "a", lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        runs.run(arm(stop_at_the_second), 0, tmp_path / "b", lambda text: None)
    resumed = runs.run(arm(look), 0, tmp_path / "b", lambda text: None)
    assert [row["step"] for row in whole] == [2, 5]
    for row, other in zip(whole, resumed, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    with pytest.raises(ValueError, match="holds another run"):
        runs.run(replace(arm(look), name="c"), 0, tmp_path / "b", lambda text: None)


def test_the_command_reports_only_what_ran(tmp_path, capsys) -> None:
    common = ["compute", "--out", str(tmp_path), "--json", str(tmp_path / "json"),
              "--pictures", str(tmp_path / "pictures"), "--steps", "1", "--clips", "2",
              "--cache", "32", "--seeds", "1"]  # fmt: skip
    main([*common, "--arm", "1x"])
    assert "to be run: 4x-0, 16x-0" in capsys.readouterr().out
    assert not (tmp_path / "json").exists()
    main(common)
    path = tmp_path / "json" / "study_compute.json"
    result = json.loads(path.read_text())
    steps = [arm["runs"][0][-1]["step"] for arm in result["arms"].values()]
    assert steps == [1, 4, 16]
    flops = [arm["summary"]["flops"]["mean"] for arm in result["arms"].values()]
    assert flops[0] < flops[1] < flops[2]
    names = {"study_compute.png", "study_compute_clips.png"}
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == names
    shutil.rmtree(tmp_path / "caches")  # not asked for again: the runs are done
    before = path.read_bytes()
    main(common)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "3"], "--seed: expected some of"),
        (["--arm", "2x"], "--arm: expected some of 1x, 4x, 16x, got 2x"),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        main(["compute", "--out", str(tmp_path), "--clips", "1", *arguments])
