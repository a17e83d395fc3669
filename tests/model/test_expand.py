"""Prompt expansion: what is said is kept, what is added fits, and once is enough."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import generate
from model.checkpoint import save_dit
from model.config import WORLDS, DiTConfig
from model.dit import DiT
from model.expand import ASPECTS, expand, room
from model.grammar import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZES,
    SPEEDS,
    SYNONYMS,
    VOCABULARY,
    captions,
    parse,
    words,
)
from model.provenance import verify
from model.text import UnknownWords, Vocabulary
from model.vae import VideoVAE, save_vae
from model.world import KINDS, sample_scene

SEEDS = st.integers(-(2**40), 2**40)
LEAVES = st.sets(st.sampled_from(ASPECTS))


def maybe(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(["", *texts])


@st.composite
def prompts(draw: st.DrawFn) -> str:
    """One to four objects with any part left out, clauses in any place, synonyms among the words.

    Some contradict themselves.
    """
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        parts.append([
            draw(maybe("a", "the", "an")), draw(maybe(*SIZES, "tiny")), draw(maybe(*COLOURS)),
            draw(st.sampled_from([*SHAPES, "ball", "box"])), draw(maybe("moving", "standing")),
            draw(maybe(*DIRECTIONS, "up left", "still")), draw(maybe(*SPEEDS, "fast")),
            draw(maybe("bouncing", "bouncing off the wall", "leaving the frame")),
            draw(maybe("on a gray background")),
        ])  # fmt: skip
    text = " and ".join(" ".join(part) for part in parts)
    return " ".join([
        draw(maybe("image of", "an image of", "with a checkered black background")), text,
        draw(maybe("collide")), draw(maybe("while the camera pans up", "and the camera pans left")),
        draw(maybe("with the red circle in front")),
        draw(maybe(*(f"on a {name} background" for name in BACKGROUNDS))),
    ])  # fmt: skip


def check(prompt: str, seed: int = 0, **options) -> str:
    """The expanded prompt, which has what every expanded prompt must have."""
    text = expand(prompt, seed, **options)
    assert set(text.split()) <= set(VOCABULARY)
    assert expand(text, seed, **options) == expand(text, seed + 1, **options) == text
    assert expand(prompt, seed, **options) == text
    before, after = parse(prompt), parse(text)
    assert len(after) >= len(before)  # more if something stood behind a "with"
    for old, new in zip(before, after, strict=False):
        said = {name: value for name, value in asdict(old).items() if value is not None}
        assert said.items() <= asdict(new).items(), (prompt, text)
    for colour in BACKGROUNDS:
        assert f"{colour} background" in text or colour not in words(prompt)
    for word in ("bouncing", "leaving", "collide", "camera", "front"):
        assert (word in words(text)) == (word in words(prompt)), (prompt, text)
    if "still" in words(text):
        assert {"still", "standing"} & set(words(prompt)), (prompt, text)
    return text


@settings(max_examples=120, deadline=None)
@given(prompts(), SEEDS, st.sampled_from([1, 9, 17]), LEAVES)
def test_what_is_said_is_kept(prompt: str, seed: int, frames: int, leave: set[str]) -> None:
    check(prompt, seed, frames=frames, leave=leave)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*VOCABULARY, *SYNONYMS]), min_size=1, max_size=14), SEEDS)
def test_any_words_of_the_world(said: list[str], seed: int) -> None:
    text = expand(" ".join(said), seed)
    assert set(text.split()) <= set(VOCABULARY) and expand(text, seed) == text
    for old, new in zip(parse(" ".join(said)), parse(text), strict=False):
        assert {k: v for k, v in asdict(old).items() if v}.items() <= asdict(new).items()


@pytest.mark.parametrize("kind", KINDS)
def test_the_worlds_own_captions(kind: str) -> None:
    """A detailed caption is its own expansion, and a short one gets all that a detailed one has:
    the size and speed of each object, and the background."""
    for number in range(4):
        rng = np.random.default_rng([5, KINDS.index(kind), number])
        frames = {"image": 1, "exit": 17}.get(kind, 9)
        scene = sample_scene(rng, WORLDS["rich"], kind=kind, size=(48, 48), frames=frames)
        short, detailed = captions(scene)
        assert check(detailed, number, frames=frames, size=(48, 48)) == detailed
        text = check(short, number, frames=frames, size=(48, 48))
        for ours, true in zip(parse(text), parse(detailed), strict=True):
            assert [v is None for v in asdict(ours).values()] == [
                v is None for v in asdict(true).values()
            ]
        assert ("checkered" in text) == scene.checkered
        told = re.sub(" with the .* in front", "", detailed)  # only a detailed caption says it
        assert len(text.split()) == len(told.split())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(COLOURS)), st.sampled_from(SHAPES), maybe(*DIRECTIONS),
    maybe(*SPEEDS), SEEDS, st.sampled_from([5, 9, 13, 17]),
    st.sampled_from([(32, 32), (48, 32), (32, 64)]),
)  # fmt: skip
def test_the_world_can_draw_what_was_added(
    colour: str, shape: str, direction: str, speed: str, seed: int, frames: int, size: tuple
) -> None:
    text = expand(f"a {colour} {shape} moving {direction} {speed}", seed, frames=frames, size=size)
    (want,) = parse(text)
    if speed == "quickly" and frames == 17:
        return  # no way fits, whatever is added
    rng = np.random.default_rng(abs(seed))
    scene = sample_scene(rng, kind="one", size=size, frames=frames, wanted=want)
    assert captions(scene)[1].split(" on a ")[0] == text.split(" on a ")[0]


def test_what_is_drawn() -> None:
    """In the mix of the small model's world, and with no held-out combination."""
    texts = [expand("a circle moving", seed) for seed in range(300)]
    seen = [parse(text)[0] for text in texts]
    assert not HELD_OUT & {(w.shape, w.colour, w.direction) for w in seen}
    assert {w.colour for w in seen} == set(COLOURS)
    assert {w.direction for w in seen} == set(DIRECTIONS)
    assert {w.speed for w in seen} == set(SPEEDS)
    small = sum(w.size == "small" for w in seen) / len(seen)
    assert 0.15 < small < 0.40  # a quarter in the world
    mix = dict(WORLDS["tiny"].backgrounds)
    for name in BACKGROUNDS:
        part = sum(text.endswith(f" {name} background") for text in texts) / len(texts)
        assert abs(part - mix.get(name, 0)) < 0.1
    held = "a red circle moving right"
    assert ("circle", "red", "right") in HELD_OUT
    assert {parse(expand(held, seed))[0].direction for seed in range(20)} == {"right"}
    two = [parse(expand("a square and a red cross and a triangle", seed)) for seed in range(60)]
    assert all(len({w.colour for w in objects}) == 3 for objects in two)
    assert all(w.size == "small" for objects in two for w in objects)


def test_a_way_that_does_not_fit_is_not_drawn() -> None:
    assert {parse(expand("a red cross moving left", s, frames=17))[0].speed for s in range(30)} == {
        "slowly"
    }
    wide = [
        parse(expand("a red cross moving left", s, frames=17, size=(32, 96))) for s in range(60)
    ]
    assert {w.speed for (w,) in wide} == set(SPEEDS)
    assert room(wide[0][0], 1, (32, 32)) > 0  # type: ignore[arg-type]
    far = parse(expand("a red cross moving left quickly", frames=65))[0]
    assert far.size == "small"  # the nearest to fitting


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Red ball, standing.", "a large red circle standing still on a black background"),
        ("a red circle moving left on a black background",
         "a large red circle moving left quickly on a black background"),
        ("a red circle on a black background moving left slowly",
         "a small red circle moving left slowly on a black background"),
        ("with a white background a small red disc moving up left fast",
         "a small red circle moving up-left quickly on a white background"),
        # Read as no caption: kept.
        ("red a circle", "red a circle"),
        ("a red blue circle", "a red blue circle"),
        ("a red circle moving still", "a red circle moving still"),
        ("a red circle moving left right", "a red circle moving left right"),
        ("an image of a red dot moving left", "a image of a red circle moving left"),
        ("a red circle collide", "a red circle collide"),
        ("a circle and a square and a cross and a triangle",
         "a circle and a square and a cross and a triangle"),
        ("the wall", "the wall"),
    ],
)  # fmt: skip
def test_examples(prompt: str, text: str) -> None:
    assert expand(prompt) == text


def test_an_image_has_no_motion() -> None:
    for prompt, frames in (("a red circle", 1), ("image of a red circle", 9)):
        text = check(prompt, 3, frames=frames)
        assert text.startswith("image of a ") and parse(text)[0].direction is None
    assert "moving" in expand("a red circle", frames=9)
    assert expand("a red circle moving left", frames=1).startswith("a ")  # it says a motion


def test_bad_input() -> None:
    with pytest.raises(UnknownWords, match="'zebra'"):
        expand("a red zebra")
    with pytest.raises(ValueError, match="at least one word"):
        expand(" ... ")
    with pytest.raises(ValueError, match="leave: expected some of colour, .* got shape"):
        expand("a red circle", leave=("shape",))
    with pytest.raises(ValueError, match=r"frames, size: expected at least 1, got 0"):
        expand("a red circle", frames=0)


# --- command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ((), 5), (("--loop",), 5 - 2), (("--image", "a.png"), 2), (("--extend", "a.mp4"), 0),
        (("--edit", "a.mp4"), 0), (("--fill", "a.mp4"), 0), (("--connect", "a.mp4", "b.mp4"), 0),
    ],
)  # fmt: skip
def test_known_frames_are_not_contradicted(options: tuple[str, ...], added: int) -> None:
    """What the frames show is left open; a loop has no direction and so no speed."""
    line = ["a circle bouncing off the wall", "-o", "a.mp4", "--expand", *options]
    args = generate.check(generate.make_parser().parse_args(line))
    text = generate.expanded(args)
    (want,) = parse(text)
    told = [want.colour, want.size, want.direction, want.speed]
    assert sum(v is not None for v in told) + ("background" in text) == added
    assert "bouncing off the wall" in text


def test_the_command_prints_and_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    known = Vocabulary(VOCABULARY)
    config = DiTConfig(16, 1, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), vocabulary=len(known))
    save_dit(tmp_path, DiT(config), known, {})
    save_vae(VideoVAE(), tmp_path)
    out, prompt = tmp_path / "a.mp4", "a red circle moving left"
    line = [prompt, "-o", str(out), "--checkpoint", str(tmp_path), "--steps", "1", "--quiet",
            "--size", "16x16", "--frames", "5", "--seed", "2", "--expand"]  # fmt: skip
    generate.main(line)
    about, used = verify(out).about, expand(prompt, 2, frames=5, size=(16, 16))
    assert about is not None and about["prompt"] == used != prompt
    assert capsys.readouterr().out.splitlines() == [used, str(out)]
