"""The world: determinism, true captions, physics, rendering, and that it can be read back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import WORLDS, WorldConfig, from_dict, to_dict
from model.grammar import COLOURS, DIRECTIONS, HELD_OUT, SHAPES
from model.oracle import judge, read
from model.world import (
    KINDS,
    VOCABULARY,
    Scene,
    Wanted,
    captions,
    clip,
    coverage,
    parse,
    render,
    sample_scene,
    unknown_words,
    visibility,
    words,
)

RICH = WORLDS["rich"]


def scene_of(kind: str, number: int = 0, **fixed: object) -> Scene:
    frames = {"image": 1, "exit": 17}.get(kind, 9)
    options = {"frames": frames, "size": (48, 48)} | fixed
    return sample_scene(np.random.default_rng([7, number]), RICH, kind=kind, **options)  # type: ignore[arg-type]


def test_a_clip_is_a_pure_function_of_seed_split_and_index() -> None:
    one, two = clip(5, "val", seed=3), clip(5, "val", seed=3)
    assert one.scene == two.scene and torch.equal(one.video, two.video)
    others = [clip(6, "val", seed=3), clip(5, "train", seed=3), clip(5, "val", seed=4)]
    assert all(other.scene != one.scene for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_render_has_the_size_and_range_of_its_scene(kind: str) -> None:
    scene = scene_of(kind, size=(32, 64))
    video = render(scene)
    assert video.shape == (3, scene.frames, 32, 64) and video.dtype == torch.float32
    assert float(video.min()) >= -1 and float(video.max()) <= 1


def test_held_out_combinations_are_balanced_and_never_in_training() -> None:
    assert len(HELD_OUT) == 16
    for position, names in enumerate((SHAPES, COLOURS, DIRECTIONS)):
        counts = Counter(item[position] for item in HELD_OUT)
        assert set(counts) == set(names) and max(counts.values()) <= 4
    for config in WORLDS.values():
        for number in range(60):
            scene = clip(number, "train", config=config).scene
            for item in scene.objects:
                assert not {(item.shape, item.colour, h) for h in item.headings} & HELD_OUT
    for number in range(30):
        (item,) = clip(number, "held_out").scene.objects
        assert (item.shape, item.colour, item.direction) in HELD_OUT


def test_captions_stay_in_the_vocabulary_and_read_back() -> None:
    for kind in KINDS:
        for number in range(4):
            scene = scene_of(kind, number)
            for text in captions(scene):
                assert unknown_words(text) == []
                found = parse(text)
                assert [(w.shape, w.colour) for w in found] == [
                    (item.shape, item.colour) for item in scene.objects
                ]
                if scene.frames > 1:
                    assert [w.direction for w in found] == [o.direction for o in scene.objects]
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


def test_words_resolve_synonyms_and_name_the_unknown() -> None:
    assert words("A GREY ball, going up left!") == ["a", "gray", "circle", "moving", "up-left"]
    assert unknown_words("a red dragon flying, a red dragon") == ["dragon", "flying"]
    assert parse("a ball moving down right and a blue box") == (
        Wanted("circle", None, "down-right"),
        Wanted("square", "blue", None),
    )


def test_promised_events_happen() -> None:
    for number in range(4):
        bounce = scene_of("bounce", number)
        assert bounce.events and bounce.events[0].kind == "bounce"
        assert len(set(bounce.objects[0].headings)) > 1 and "bouncing" in captions(bounce)[0]
        leaving = scene_of("exit", number)
        area = visibility(leaving)[0]
        assert area[-1] < 0.3 * area[0] and "leaving" in captions(leaving)[0]
        hidden = scene_of("occlude", number)
        areas = visibility(hidden)
        assert areas[0].min() < 0.8 * areas[0].max()  # the one in the back
        assert areas[1].min() > 0.95 * areas[1].max()  # the one in front
        assert "in front" in captions(hidden)[1]


def test_collisions_keep_momentum_and_energy() -> None:
    for number in range(3):
        scene = scene_of("collide", number, frames=13)
        first = next(e for e in scene.events if e.kind == "collision").frame
        later = [e.frame for e in scene.events if e.frame > first] + [scene.frames]
        if later[0] - first < 3:
            continue
        paths = np.array([item.path for item in scene.objects])
        mass = np.array([item.radius**2 for item in scene.objects])[:, None]
        before, after = paths[:, 1] - paths[:, 0], paths[:, first + 1] - paths[:, first]
        np.testing.assert_allclose((mass * before).sum(0), (mass * after).sum(0), atol=1e-6)
        np.testing.assert_allclose((mass * before**2).sum(), (mass * after**2).sum(), rtol=1e-6)


def test_the_camera_moves_the_background_and_still_objects_alike() -> None:
    scene = scene_of("camera")
    pan = np.array(scene.camera_path)
    moved = np.array(scene.objects[0].path) + pan  # back in the world
    steps = np.diff(moved, axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), atol=1e-9)
    assert scene.checkered and np.linalg.norm(pan[-1]) > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_rendering_is_anti_aliased_and_moves_smoothly(shape: str) -> None:
    path = np.array([[16 + 0.1 * n, 16.0] for n in range(11)])
    masks = coverage(shape, 7.0, path, 32, 32)
    x = (masks * (np.arange(32) + 0.5)).sum((1, 2)) / masks.sum((1, 2))
    np.testing.assert_allclose(np.diff(x), 0.1, atol=0.03)
    area = masks.sum((1, 2))
    assert float(area.std() / area.mean()) < 0.01


def test_bad_requests_raise() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="split"):
        clip(0, "test")
    with pytest.raises(ValueError, match="kind"):
        sample_scene(rng, kind="flying")
    with pytest.raises(ValueError, match="kind"):
        sample_scene(rng, kind="one", frames=1)
    with pytest.raises(ValueError, match="kind"):
        sample_scene(rng, kind="exit", frames=5)  # cannot leave that fast
    with pytest.raises(ValueError, match="sizes"):
        WorldConfig(sizes=(((20, 32), 1.0),))
    with pytest.raises(ValueError, match="frames"):
        WorldConfig(frames=((4, 1.0),))
    with pytest.raises(ValueError, match="unknown fields"):
        from_dict(WorldConfig, {"speed": 1})


def test_a_config_survives_json() -> None:
    for config in WORLDS.values():
        assert from_dict(WorldConfig, to_dict(config)) == config


def test_the_oracle_is_always_right_about_one_object() -> None:
    """The certificate: 100% on true one-object clips of every size, duration and combination."""
    config = replace(RICH, kinds=(("one", 0.85), ("still", 0.15)))
    for number in range(60):
        item = clip(number, "held_out" if number % 4 == 0 else "val", config=config)
        if len(item.scene.objects) > 1:
            continue
        verdict = judge(read(item.video), item.scene)
        assert verdict.right and verdict.count, (item.detailed, tuple(item.video.shape))
        assert judge(read(item.video), item.short).right
        assert read(item.video).background == item.scene.background
