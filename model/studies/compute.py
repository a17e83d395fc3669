"""Quality against training compute: the same model after 1x, 4x and 16x.

Sora's report shows samples of fixed prompts at base, 4x and 32x compute. Here a run of each length
has a schedule of its own, from warm-up to zero, so that each is the best of its budget; and the
same prompts start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.checkpoint import read_tensors
from model.config import TrainConfig, WorldConfig
from model.data import LatentCache
from model.dit import DiT
from model.stack import Stack
from model.studies.looking import Validation, answers, asks, attributes
from model.studies.making import encoded, new_dit
from model.studies.runs import STATE, Arm, Row
from model.text import Vocabulary
from model.train import Trainer
from model.vae import VideoVAE
from model.video import contact_sheet
from model.world import VOCABULARY

WORLD = WorldConfig(sizes=(((32, 32), 1.0),), frames=((9, 0.9), (1, 0.1)), small=0.0)
CONFIG = TrainConfig(
    "tiny", "compute", clips=8192, tokens=768, steps=200, learning_rate=2e-3, muon=0.02,
    shift=2.0, ema=0.99, warmup=40, detailed=0.0,
)  # fmt: skip
FACTORS = {"1x": 1, "4x": 4, "16x": 16}


def caches(vae: VideoVAE, seed: int, clips: int) -> LatentCache:
    """Clips of the study's world, encoded."""
    return encoded(vae.encode, WORLD, seed, clips)


def trainer(steps: int, cache: Callable[[int], LatentCache], seed: int) -> Trainer:
    """A fresh trainer of a run of `steps` steps."""
    model = new_dit(CONFIG.dit)
    return Trainer(model, replace(CONFIG, steps=steps, seed=seed), cache(seed))


def arms(vae: VideoVAE, cache: Callable[[int], LatentCache], steps: int, clips: int) -> list[Arm]:
    """Three lengths of training, the shortest of `steps` steps."""
    vocabulary, wanted = Vocabulary(VOCABULARY), asks(WORLD, [(32, 32)], 9, clips)
    seen = Validation(caches(vae, 1000, max(16, 2 * clips)), CONFIG.tokens, 12)

    def look(model: DiT) -> Row:
        made = answers(Stack(model, vae, vocabulary), wanted)
        return {"loss": seen(model), **attributes(wanted, made)}

    return [
        Arm(name, f"{name} compute", partial(trainer, factor * steps, cache), look,
            (factor * steps,), in_steps=True)
        for name, factor in FACTORS.items()
    ]  # fmt: skip


def samples(vae: VideoVAE, folders: list[Path], path: Path) -> None:
    """Rows of frames: every prompt after every amount of training, from the same noise."""
    vocabulary, wanted = Vocabulary(VOCABULARY), asks(WORLD, [(32, 32)], 9, 3)
    made = []
    for folder in folders:
        tensors, _ = read_tensors(folder / STATE)
        model = new_dit(CONFIG.dit)
        prefix = "average."
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        made.append(answers(Stack(model.eval(), vae, vocabulary), wanted))
    contact_sheet(path, [clip for same in zip(*made, strict=True) for clip in same], scale=2)


def picture(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Loss and accuracy over training compute, mean and range of the seeds."""
    from model.studies.plots import band, figure, save

    fig, (left, right) = figure(2)
    runs = list(zip(*results.values(), strict=True))  # a curve per seed
    flops = [row[-1]["flops"] / 1e12 for row in runs[0]]
    band(left, flops, [[row[-1]["loss"] for row in curve] for curve in runs], "")
    band(right, flops, [[100 * row[-1]["all"] for row in curve] for curve in runs], "all of them")
    band(right, flops, [[100 * row[-1]["each"] for row in curve] for curve in runs], "each")
    left.set(xlabel="training compute (TFLOP)", ylabel="validation loss", xscale="log")
    right.set(xlabel="training compute (TFLOP)", ylabel="attributes right (%)", xscale="log")
    right.legend(fontsize=8)
    save(fig, path)
