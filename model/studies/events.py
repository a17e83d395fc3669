"""Two objects, occlusion, collision, bounce: where training is heading.

The shipped checkpoint knows one object well and hardly anything of these. It is trained on, on them
alone, and read at several budgets by the judge's own rows: the curve, not the end, is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from model.config import TrainConfig, WorldConfig
from model.data import LatentCache
from model.dit import DiT
from model.evaluate import in_packs
from model.oracle import read
from model.scoring import estimate, measure
from model.stack import CHECKPOINT, Stack
from model.studies.looking import SAMPLING, Validation
from model.studies.making import encoded, new_dit
from model.studies.runs import Arm, Row
from model.suites import SUITES, Item, items_of, job_of, round_trip
from model.text import Vocabulary
from model.train import Trainer, start_from
from model.vae import VideoVAE
from model.world import VOCABULARY

SEED = 5  # of what is asked
WORLD = WorldConfig(
    kinds=(("two", 0.5), ("bounce", 0.2), ("occlude", 0.15), ("collide", 0.15)),
    sizes=(((32, 48), 0.5), ((32, 32), 0.2), ((48, 48), 0.3)),
    frames=((9, 0.8), (13, 0.2)),
    backgrounds=(("black", 0.5), ("gray", 0.25), ("white", 0.25)),
)
CONFIG = TrainConfig(
    "tiny", "events", clips=8192, tokens=1152, steps=10**6, learning_rate=1e-3, muon=0.01,
    shift=2.0, ema=0.997, detailed=0.2,
)  # fmt: skip
LABELS = {"two_objects": "two objects", "occlusion": "occlusion", "collision": "collision",
          "bounce": "bounce"}  # fmt: skip
METRICS = ("all", "event_happened", "event_right")


def caches(vae: VideoVAE, seed: int, clips: int) -> LatentCache:
    """Clips of the study's world, encoded."""
    return encoded(vae.encode, WORLD, seed, clips)


def trainer(cache: Callable[[int], LatentCache], seed: int) -> Trainer:
    """The shipped checkpoint, ready to go on."""
    vocabulary = Vocabulary(VOCABULARY)
    model = new_dit(CONFIG.dit)
    start_from(model, vocabulary, CHECKPOINT)
    return Trainer(model, replace(CONFIG, seed=seed), cache(seed))


def questions(clips: int) -> dict[str, list[Item]]:
    """The judge's items, by row."""
    return {suite.name: items_of(suite, clips, SEED) for suite in SUITES if suite.name in LABELS}


def scores(rows: dict[str, list[Item]], made: dict[str, list[Tensor]]) -> Row:
    """METRICS of every row, as `row_metric`; an event's is None where none happened."""
    found: Row = {}
    for name, items in rows.items():
        values = [
            measure(item, clip, read(clip), clip)
            for item, clip in zip(items, made[name], strict=True)
        ]
        for metric in METRICS:
            if metric in values[0]:
                rate = estimate(metric, [value[metric] for value in values])
                found[f"{name}_{metric}"] = None if rate is None else rate.value
    return found


def ceilings(vae: VideoVAE, rows: dict[str, list[Item]]) -> Row:
    """What round trips of the true clips through the VAE score."""
    return scores(rows, {name: [round_trip(vae, item) for item in items]
                         for name, items in rows.items()})  # fmt: skip


def arms(
    vae: VideoVAE, cache: Callable[[int], LatentCache], minutes: float, clips: int
) -> list[Arm]:
    """One arm, looked at before the first step and at five budgets."""
    vocabulary, wanted = Vocabulary(VOCABULARY), questions(clips)
    seen = Validation(caches(vae, 1000, max(16, clips)), CONFIG.tokens, 8)

    def look(model: DiT) -> Row:
        stack, made = Stack(model, vae, vocabulary), {}
        for name, items in wanted.items():
            jobs = [job_of(item, number) for number, item in enumerate(items)]
            made[name] = in_packs(stack, jobs, SAMPLING)
        return {"loss": seen(model), **scores(wanted, made)}

    budgets = tuple(60 * minutes * share for share in (0, 0.1, 0.2, 0.4, 0.7, 1))
    return [Arm("continued", "on two objects and events", partial(trainer, cache), look, budgets)]


def picture(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Accuracy over time, a curve a row of the judge; and the loss."""
    from model.studies.plots import band, figure, save

    fig, (left, right) = figure(2)
    (found,) = results.values()
    minutes = [row["budget"] / 60 for row in found[0]]
    band(left, minutes, [[row["loss"] for row in run] for run in found], "")
    for name, label in LABELS.items():
        band(right, minutes, [[100 * row[f"{name}_all"] for row in run] for run in found], label)
    left.set(xlabel="CPU minutes of training", ylabel="validation loss")
    right.set(xlabel="CPU minutes of training", ylabel="every attribute right (%)")
    right.legend(fontsize=7)
    save(fig, path)
