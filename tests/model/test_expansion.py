"""The measuring of prompt expansion: its statistics against known values, its pairing, its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import expansion
from model.expand import expand
from model.expansion import ROWS, _table, flags_of, headline, main, mcnemar, measure, paired
from model.oracle import read
from model.sample import Sampling
from model.suites import items_of

SUITE = ROWS["one_object"]


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == 2 / 2**10
    assert mcnemar(1, 7) == mcnemar(7, 1) == 2 * (1 + 8) / 2**8


def test_the_interval_of_a_difference_is_that_of_agresti_and_min() -> None:
    """Agresti's example: 1600 persons asked twice, 944 and then 880 of them approve."""
    before = [True] * 794 + [True] * 150 + [False] * 86 + [False] * 570
    after = [True] * 794 + [False] * 150 + [True] * 86 + [False] * 570
    found = paired(before, after)
    assert (found["gained"], found["lost"]) == (86, 150)
    assert found["difference"] == -0.04
    assert (found["low"], found["high"]) == pytest.approx((-0.059, -0.021), abs=1e-3)
    assert found["p"] == pytest.approx(3.7e-5, rel=0.05)
    with pytest.raises(ValueError, match="before, after: expected equal counts, got 2, 1"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match="got 0, 0"):
        paired([], [])


def test_a_table_leaves_out_what_no_prompt_asks_for() -> None:
    short = [{"colour": True, "speed": None}, {"colour": False, "speed": None}]
    full = [{"colour": True, "speed": None}, {"colour": True, "speed": None}]
    found = _table({"short": short, "expanded": full})
    assert set(found) == {"colour"}
    assert (found["colour"]["short"]["value"], found["colour"]["expanded"]["value"]) == (0.5, 1.0)
    assert (found["colour"]["paired"]["gained"], found["colour"]["paired"]["lost"]) == (1, 0)


def test_a_true_clip_has_what_its_own_prompt_asks_for_and_no_other_background() -> None:
    item = items_of(SUITE, 1, 3)[0]
    reading = read(item.video)
    asked = flags_of(reading, f"{item.prompt} on a {reading.background} background", SUITE)
    assert asked["all"] and asked["background"] is True
    other = "white" if reading.background != "white" else "black"
    wrong = flags_of(reading, f"{item.prompt} on a {other} background", SUITE)
    assert wrong["all"] and wrong["background"] is False
    assert flags_of(reading, item.prompt, SUITE)["background"] is None


def made(monkeypatch: pytest.MonkeyPatch, clips: dict[str, torch.Tensor]) -> list[Any]:
    """Generation that gives the true clip for a short prompt, and noise for a long one."""
    jobs: list[Any] = []

    def in_packs(stack: object, wanted: list[Any], sampling: object) -> list[torch.Tensor]:
        jobs.append(wanted)
        return [clips.get(job.prompt, torch.zeros(3, *next(iter(clips.values())).shape[1:]))
                for job in wanted]  # fmt: skip

    monkeypatch.setattr(expansion, "in_packs", in_packs)
    monkeypatch.setattr(expansion, "round_trip", lambda vae, item: item.video)
    return jobs


def test_both_arms_share_scenes_and_seeds_and_only_the_prompt_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = items_of(SUITE, 3, 5)
    jobs = made(monkeypatch, {item.prompt: item.video for item in items})
    stack: Any = type("Stack", (), {"vae": None})()
    row = measure(stack, SUITE, 3, 5, Sampling())
    short, full = jobs
    assert [job.prompt for job in short] == [item.prompt for item in items]
    frames, size = SUITE.frames, SUITE.size
    assert [job.prompt for job in full] == [
        expand(item.prompt, number, frames=frames, size=size) for number, item in enumerate(items)
    ]
    assert [job.seed for job in short] == [job.seed for job in full]
    assert len({job.seed for job in short}) == 3
    found = row["short_wishes"]["all"]
    assert found["short"]["value"] == found["true"]["value"] == 1.0
    assert found["expanded"]["value"] == 0.0 and found["paired"]["lost"] == 3
    assert "true" not in row["expanded_wishes"]["all"]  # nobody rendered those
    assert "what the short prompt asks for: short 1.000, expanded 0.000" in headline(row)
    json.dumps(row)


def test_the_command_writes_a_row_and_refuses_unknown_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = items_of(SUITE, 2, 1)
    made(monkeypatch, {item.prompt: item.video for item in items})
    stack: Any = type("Stack", (), {"vae": None})()
    monkeypatch.setattr(expansion, "load_stack", lambda folder, device: stack)
    out = tmp_path / "expansion.json"
    with pytest.raises(ValueError, match="--only: expected some of .*got nothing_such"):
        main(["--json", str(out), "--only", "nothing_such"])
    main(["--json", str(out), "--clips", "2"])
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["rows"]] == ["one_object"]
    assert written["rows"][0]["clips"] == 2 and written["seed"] == 1
    assert capsys.readouterr().out.count("one_object") == 2


def test_the_committed_file_is_of_these_scenes() -> None:
    """A row of other scenes, or of another rule of expansion, must be measured again."""
    path = Path(__file__).parents[2] / "model" / "results" / "expansion.json"
    written = json.loads(path.read_text())
    row = written["rows"][0]
    suite = ROWS[row["name"]]
    items = items_of(suite, 4, written["seed"])
    assert row["prompts"]["short"] == [item.prompt for item in items]
    assert row["prompts"]["expanded"] == [
        expand(item.prompt, number, frames=suite.frames, size=suite.size)
        for number, item in enumerate(items)
    ]
