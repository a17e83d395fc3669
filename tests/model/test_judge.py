"""The judge's commands: anybody's clips are scored, the certificate adds up, bad input is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.grammar import COLOURS, Wanted, parse
from model.judge.__main__ import main
from model.judge.certify import certify, false_accepts, scenes_of, wrong
from model.judge.clips import allowances, chance_of, read_clip, read_prompts, score_folder
from model.metrics import joint
from model.oracle import read
from model.video import to_uint8, write_image, write_video
from model.world import captions, clip, render, sample_scene

FIXED = {"size": (48, 48), "frames": 9}


def scene(number: int, kind: str = "one", **more: object):  # type: ignore[no-untyped-def]
    return sample_scene(np.random.default_rng([9, number]), kind=kind, **(FIXED | more))  # type: ignore[arg-type]


def test_clips_of_every_format_are_scored(tmp_path: Path) -> None:
    folder, lines = tmp_path / "clips", []
    folder.mkdir()
    scenes = [scene(number) for number in range(4)]
    videos = [render(made) for made in scenes]
    write_video(folder / "a.mp4", videos[0], scale=4)
    np.save(folder / "b.npy", to_uint8(videos[1]))
    np.save(folder / "c.npy", videos[2].numpy())
    np.save(folder / "d.npy", videos[2].numpy())  # of another prompt
    image = scene(5, "image", frames=1)
    write_image(folder / "e.png", render(image))
    for name, made in zip("abcde", [*scenes, image], strict=True):
        lines.append(f"{name}\t{captions(made)[0]}")
    lines.append("f.mp4\ta red circle moving left")
    prompts, out = tmp_path / "prompts.tsv", tmp_path / "scores.json"
    prompts.write_text("\n".join(lines) + "\n")
    main(["score", "--clips", str(folder), "--prompts", str(prompts), "--json", str(out)])
    report = json.loads(out.read_text())
    assert [row["all"] for row in report["rows"]] == [True, True, True, False, True, False]
    assert report["missing"] == 1 and report["metrics"]["all"]["value"] == pytest.approx(
        4 / 6, abs=1e-4
    )
    assert report["shuffled"]["value"] <= 1 / 6 and report["judge"]["oracle"]
    assert report["chance"] == pytest.approx((5 / 192 + 1 / 24) / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a a red circle\n", "a tab and a prompt"),
        ("a\tsomething nice\n", "names an object in line 1"),
        ("a\ta red circle\na\ta red circle\n", "once"),
        ("\n", "empty"),
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p")


def test_wrong_clips_are_refused(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "clips", tmp_path / "p"
    prompts.write_text("a\ta red circle moving left\n")
    with pytest.raises(ValueError, match="expected a folder"):
        score_folder(folder, prompts)
    folder.mkdir()
    np.save(folder / "b.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="none for b.npy"):
        score_folder(folder, prompts)
    (folder / "b.npy").unlink()
    for array in (
        np.zeros((8, 8, 3), np.uint8),
        np.full((3, 2, 8, 8), 2.0),
        np.zeros((3, 2, 8, 8), int),
    ):
        np.save(folder / "a.npy", array)
        with pytest.raises(ValueError, match="expected uint8"):
            read_clip(folder / "a.npy")
    (folder / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="no readable array"):
        read_clip(folder / "a.npy")


def test_what_a_prompt_allows() -> None:
    assert allowances("a red circle moving left") == (False, 0.95)
    assert allowances("a red circle moving left bouncing off the wall")[0]
    for kind, number in (("exit", 1), ("camera", 2), ("bounce", 3)):
        made = scene(number, kind, frames=17 if kind == "exit" else 9)
        text = captions(made)[0]
        assert joint(read(render(made)), parse(text), made.frames, 48, *allowances(text))["all"], (
            text
        )


def test_chance_counts_words() -> None:
    assert chance_of((Wanted("circle", "red", "left"),)) == pytest.approx(1 / 192)
    assert chance_of((Wanted("circle"), Wanted("cross"))) == pytest.approx(2 / 16)
    assert chance_of((Wanted(),)) == 1


def test_the_certificate_of_true_clips(tmp_path: Path) -> None:
    report = certify(None, 6, 1, 2)
    parts = {(part["kind"], part["size"]): part for part in report["parts"]}
    one = parts["one", "32x32"]
    assert one["sources"]["true"]["all"]["value"] == 1 and one["clips"] == 6
    assert one["sources"]["true"]["position"]["position_p99"] < 0.2
    assert one["sources"]["noise_0.4"]["all"]["n"] == 2
    assert {"shape", "colour", "size", "direction", "speed", "missing"} == set(one["false_accept"])
    assert all(rate["value"] == 0 for rate in one["false_accept"].values())
    assert "extra" in parts["two", "48x48"]["false_accept"]


def test_wrong_clips_differ_in_one_attribute() -> None:
    wanted = list(parse("a small red circle moving left slowly and a blue cross moving up"))
    for name, asked in wrong(wanted, np.random.default_rng(0)).items():
        if name in ("missing", "extra"):
            assert abs(len(asked) - len(wanted)) == 1
            continue
        first = asked[0]
        assert getattr(first, name) != getattr(wanted[0], name) and asked[1:] == wanted[1:]
        kept = {field: getattr(wanted[0], field) for field in (name, "speed")}
        assert replace(first, **kept) == wanted[0]


def test_a_careless_oracle_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that takes every colour for the right one has false accepts."""
    from model.judge import certify as module

    scenes = scenes_of("one", (32, 32), 4, 5)
    readings = [read(render(made)) for made in scenes]
    real = module.judge
    monkeypatch.setattr(
        module,
        "judge",
        lambda reading, asked: real(reading, [replace(w, colour=None) for w in asked]),
    )
    found = false_accepts(readings, scenes)
    assert found["colour"]["value"] == 1 and found["shape"]["value"] == 0


def test_the_document_says_what_the_code_does() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text()
    block = re.search(r"```\n(0001\t.*?)```", text, re.DOTALL)
    assert block is not None
    for line in block.group(1).splitlines():
        (item,) = parse(line.partition("\t")[2])
        assert item.shape and item.colour in COLOURS and item.direction
    assert clip(0, "val").detailed
    frozen = json.loads((Path(__file__).parents[2] / "model/judge/frozen.json").read_text())
    for version in frozen:
        assert f"| {version} |" in text
