"""Runs of a study: a trainer is advanced to one budget after another and looked at there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.budget import training_flops
from model.checkpoint import CheckpointError, read_tensors, write_json, write_tensors
from model.config import to_dict
from model.dit import DiT
from model.train import Trainer

Row = dict[str, Any]
Look = Callable[[DiT], Row]

STATE = "state.safetensors"
RESULT = "run.json"


@dataclass(frozen=True)
class Arm:
    """One of the ways that a study compares.

    label: for people.
    trainer: a fresh trainer for a seed.
    look: what is measured of the averaged model at every budget, outside of the clock.
    budgets: rising; CPU seconds of training, or steps where `in_steps`.
    """

    name: str
    label: str
    trainer: Callable[[int], Trainer]
    look: Look
    budgets: tuple[float, ...]
    in_steps: bool = False


def run(arm: Arm, seed: int, folder: Path, say: Callable[[str], None]) -> list[Row]:
    """Trains `arm` from `seed` and returns a row per budget; resumes what `folder` holds.

    A row has `step`, `seconds` (CPU seconds of one thread, in which a busy machine shows less than
    in wall time), `clips`, `tokens`, `flops` and what `arm.look` adds.
    """
    torch.manual_seed(seed)
    trainer = arm.trainer(seed)
    key = {"arm": arm.name, "seed": seed, "train": to_dict(trainer.config),
           "budgets": [float(budget) for budget in arm.budgets]}  # fmt: skip
    rows = _resume(trainer, folder / STATE, key)
    spent = dict(rows[-1]) if rows else {"seconds": 0.0, "clips": 0, "tokens": 0, "flops": 0}
    for budget in arm.budgets[len(rows) :]:
        while (trainer.step if arm.in_steps else spent["seconds"]) < budget:
            begin = time.process_time()
            _, _, batch = trainer.advance()
            spent["seconds"] += time.process_time() - begin
            spent["clips"] += batch.layout.num_segments
            spent["tokens"] += batch.layout.num_tokens
            spent["flops"] += training_flops(trainer.model.config, batch.layout.segments)
        model = trainer.averaged()
        row = {name: spent[name] for name in ("seconds", "clips", "tokens", "flops")}
        with torch.no_grad():
            rows.append({"budget": budget, "step": trainer.step, **row, **arm.look(model)})
        write_tensors(folder / STATE, trainer.state(), {"key": key, "rows": rows})
        say(f"{arm.name} seed {seed} at {budget:g}: {_brief(rows[-1])}")
    write_json(folder / RESULT, {**key, "label": arm.label, "rows": rows})
    return rows


def _resume(trainer: Trainer, path: Path, key: dict[str, Any]) -> list[Row]:
    """The rows so far, with `trainer` put where the last of them was taken."""
    if not path.exists():
        return []
    tensors, notes = read_tensors(path)
    if notes["key"] != key:
        raise CheckpointError(f"--out: {path} holds another run; choose another folder")
    trainer.restore(tensors, notes["rows"][-1]["step"])
    return notes["rows"]


def _brief(row: Row) -> str:
    shown = {k: v for k, v in row.items() if isinstance(v, float) and k not in ("seconds",)}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if name != "budget")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most over the seeds."""
    return {
        "mean": round(sum(values) / len(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
    }
