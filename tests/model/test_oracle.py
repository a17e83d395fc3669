"""The oracle: what it reads on true clips, what it refuses, and that it is frozen by hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import WORLDS
from model.grammar import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS
from model.judge import frozen
from model.oracle import dilate, judge, match_up, read
from model.world import Scene, Wanted, captions, parse, render, sample_scene


def scene_of(kind: str, number: int = 0, **fixed: object) -> Scene:
    frames = {"image": 1, "exit": 17}.get(kind, 9)
    options = {"frames": frames, "size": (32, 48)} | fixed
    rng = np.random.default_rng([8, number])
    return sample_scene(rng, WORLDS["rich"], kind=kind, **options)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from(list(COLOURS)), st.sampled_from(list(DIRECTIONS)),
    st.sampled_from(list(SIZES)), st.sampled_from(list(SPEEDS)), st.integers(0, 1000),
)  # fmt: skip
def test_it_reads_back_every_attribute_and_every_place(
    shape: str, colour: str, direction: str, size: str, speed: str, seed: int
) -> None:
    wanted = Wanted(shape, colour, direction, size, speed)
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, WORLDS["rich"], kind="one", size=(40, 40), frames=9, wanted=wanted)
    reading = read(render(scene))
    (item,) = reading.objects
    read_back = Wanted(item.shape, item.colour, item.direction, item.size, item.speed)
    assert read_back == wanted and item.straight and item.readable == 1.0
    assert parse(captions(scene)[1]) == (wanted,)
    truth = np.array(scene.objects[0].path)
    np.testing.assert_allclose(np.array(item.positions), truth, atol=0.15)
    steps = np.broadcast_to(truth[1] - truth[0], truth.shape)
    np.testing.assert_allclose(np.array(item.velocities), steps, atol=0.08)
    assert item.radius == pytest.approx(scene.objects[0].radius, rel=0.06)


def test_a_shifted_clip_is_read_as_shifted_and_a_reversed_one_as_going_back() -> None:
    video = render(scene_of("still", 3))
    (item,) = read(video).objects
    (moved,) = read(video.roll((2, 1), (2, 3))).objects
    where = np.array(item.positions) + (1, 2)
    np.testing.assert_allclose(np.array(moved.positions), where, atol=0.02)
    scene = scene_of("one", 4)
    (there,), (back,) = read(render(scene)).objects, read(render(scene).flip(1)).objects
    assert there.positions == back.positions[::-1] and back.shape == there.shape
    names = list(DIRECTIONS)
    assert names.index(str(back.direction)) == (names.index(str(there.direction)) + 4) % 8


def test_partly_visible_objects_are_still_in_their_place() -> None:
    for number in range(3):
        scene = scene_of("exit", number)
        (item,) = read(render(scene)).objects
        read_at = [t for t, place in enumerate(item.positions) if place is not None]
        assert 3 <= len(read_at) < scene.frames and item.readable < 1
        for t in read_at:
            assert item.positions[t] == pytest.approx(scene.objects[0].path[t], abs=0.6)
        hidden = scene_of("occlude", number)
        reading = read(render(hidden))
        _, objects = match_up(reading, parse(captions(hidden)[0]))
        for read_one, truth in zip(objects, hidden.objects, strict=True):
            assert read_one is not None
            for place, true in zip(read_one.positions, truth.path, strict=True):
                assert place is None or place == pytest.approx(true, abs=0.7)
        assert max(reading.counts) == 2


@pytest.mark.parametrize("change", ["shape", "colour", "direction", "size", "speed"])
def test_a_wrong_attribute_is_refused_and_only_that(change: str) -> None:
    truth = Wanted("circle", "red", "left", "small", "slowly")
    other = {
        "shape": "square", "colour": "blue", "direction": "up-left", "size": "large",
        "speed": "quickly",
    }  # fmt: skip
    wrong = replace(truth, **{change: other[change]})
    rng = np.random.default_rng(1)
    made = render(sample_scene(rng, kind="one", size=(48, 48), frames=9, wanted=wrong))
    verdict = judge(read(made), [truth])
    assert not getattr(verdict, change) and not verdict.right
    assert sum(getattr(verdict, name) for name in other) == 4


def test_tricks_are_refused() -> None:
    """A crossfade, a jump, a copied object and a colour that changes are no right clips."""
    wanted = Wanted("square", "green", "right", "small", "quickly")
    rng = np.random.default_rng(2)
    scene = sample_scene(rng, kind="one", size=(48, 48), frames=9, wanted=wanted)
    video, weight = render(scene), torch.linspace(0, 1, 9)[:, None, None]
    faded = video[:, :1] * (1 - weight) + video[:, -1:] * weight
    jump = torch.cat([video[:, :1].expand(-1, 5, -1, -1), video[:, -1:].expand(-1, 4, -1, -1)], 1)
    for trick in (faded, jump, video[:, :1].expand(-1, 9, -1, -1)):
        assert not judge(read(trick), [wanted]).right
    assert read(faded).objects[0].readable < 0.95
    still = render(scene_of("still", 6, size=(32, 32)))
    doubled = torch.cat([still, still], 3)
    (item,) = read(doubled).objects
    assert item.shape is None and item.readable == 0
    other = render(replace(scene, objects=(replace(scene.objects[0], colour="red"),)))
    changed = torch.cat([video[:, :5], other[:, 5:]], 1)
    assert not judge(read(changed), [wanted]).count


def test_the_oracle_reads_several_objects() -> None:
    for kind in ("two", "three", "occlude", "exit", "camera"):
        for number in range(3):
            scene = scene_of(kind, number, size=(48, 48))
            verdict = judge(read(render(scene)), scene)
            assert verdict.right and verdict.count, captions(scene)


def test_the_camera_is_read_and_added_back() -> None:
    scene = scene_of("camera", size=(48, 48))
    reading = read(render(scene))
    assert reading.camera is not None
    np.testing.assert_allclose(reading.camera, scene.camera_path[1], atol=0.25)


def test_the_oracle_answers_unreadable() -> None:
    noise = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for video in (torch.zeros(3, 9, 32, 32), noise):
        assert not judge(read(video), "a red circle moving left").right
    assert read(torch.zeros(3, 9, 32, 32)).objects == ()
    with pytest.raises(ValueError, match="video"):
        read(torch.zeros(1, 9, 32, 32))
    with pytest.raises(ValueError, match="finite"):
        read(torch.full((3, 9, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="truth"):
        judge(read(noise), "a picture")


def test_what_a_prompt_leaves_open_is_right() -> None:
    reading = read(render(scene_of("one", 1)))
    (item,) = reading.objects
    assert judge(reading, [Wanted(shape=item.shape)]).right
    other = "a red circle moving left and a blue circle moving up"
    assert not judge(reading, other).right and not judge(reading, other).count


def test_dilation_is_a_square_and_stays_in_its_frame() -> None:
    mask = np.zeros((2, 7, 9), dtype=bool)
    mask[0, 1, 4] = True
    grown = dilate(mask, 2)
    assert grown[0].sum() == 4 * 5 and not grown[1].any()
    assert grown[0, :4, 2:7].all()


# --- frozen --------------------------------------------------------------------------------------


def test_the_judge_is_the_one_that_was_frozen() -> None:
    frozen.check()


def test_a_changed_judge_needs_a_new_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "behaviour_hash", lambda: "b")
    path = tmp_path / "frozen.json"
    frozen.freeze("2026-01-01", path)
    before = path.read_text()
    frozen.check(path)
    frozen.freeze("2027-01-01", path)
    assert path.read_text() == before
    monkeypatch.setattr(frozen, "behaviour_hash", lambda: "c")
    for action in (lambda: frozen.check(path), lambda: frozen.freeze("2027-01-01", path)):
        with pytest.raises(ValueError, match="another behaviour"):
            action()
    monkeypatch.setattr(frozen, "ORACLE_VERSION", "next")
    with pytest.raises(ValueError, match="freeze"):
        frozen.check(path)
    frozen.freeze("2027-01-01", path)
    assert len(json.loads(path.read_text())) == 2


def test_the_source_hash_sees_code_and_not_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(text: str) -> str:
        path = tmp_path / "grammar.py"
        path.write_text(text)
        monkeypatch.setattr(frozen.grammar, "__file__", str(path))
        return frozen.source_hash()

    plain = hash_of('"""A."""\nX = 1\n')
    assert hash_of('"""B."""\nX = (  # why\n    1\n)\n') == plain
    assert hash_of('"""A."""\nX = 2\n') != plain
