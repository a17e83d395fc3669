"""The tables of the studies in ``model/results/study_*.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scores import Table

Arm = Mapping[str, Any]


def _last(arm: Arm) -> list[Mapping[str, Any]]:
    return [run[-1] for run in arm["runs"]]


def _range(values: Sequence[float], digits: int = 1) -> str:
    """Mean and range of the seeds."""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _percent(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return _range([100 * row[name] for row in rows], 0)


def packing(report: Mapping[str, Any], table: Table) -> str:
    """Clips per second, and what equal time buys."""
    arms = report["arms"]
    ours = arms["packed"]["summary"]["clips_per_second"]["mean"]
    rows = []
    for arm in arms.values():
        last = _last(arm)
        rate = arm["summary"]["clips_per_second"]["mean"]
        rows.append([
            arm["label"],
            _range([row["clips"] / row["seconds"] for row in last]),
            f"{ours / rate:.2f}",
            _range([row["loss"] for row in last], 3),
            _percent(last, "each"),
            _percent(last, "all"),
        ])  # fmt: skip
    minutes = next(iter(arms.values()))["runs"][0][-1]["budget"] / 60
    header = ("way", "clips per CPU second", "ours is faster by", "validation loss",
              "attributes right, %", "all right, %")  # fmt: skip
    return table(header, rows) + "\n\n" + _conditions(report, f"{minutes:g} CPU minutes a run")


def native(report: Mapping[str, Any], table: Table) -> str:
    """Framing and accuracy at the square and at other sizes."""
    names = ("square_framed", "native_framed", "square_all", "native_all")
    rows = [
        [arm["label"], *(_percent(_last(arm), name) for name in names)]
        for arm in report["arms"].values()
    ]
    ceilings = report["ceilings"]
    rows.append(["round trips of true clips", *(
        f"{100 * ceilings[place]['vae'][metric]:.0f}"
        for place, metric in (name.split("_") for name in names)
    )])  # fmt: skip
    minutes = next(iter(report["arms"].values()))["runs"][0][-1]["budget"] / 60
    header = ("trained on", "whole object in view at 32x32, %", "at other sizes, %",
              "all right at 32x32, %", "at other sizes, %")  # fmt: skip
    return table(header, rows) + "\n\n" + _conditions(report, f"{minutes:g} CPU minutes a run")


def compute(report: Mapping[str, Any], table: Table) -> str:
    """A rung a row: steps, compute, minutes, loss, accuracy."""
    rows = []
    for arm in report["arms"].values():
        last = _last(arm)
        rows.append([
            arm["label"],
            f"{last[0]['step']}",
            f"{last[0]['flops'] / 1e12:.1f}",
            _range([row["seconds"] / 60 for row in last]),
            _range([row["loss"] for row in last], 3),
            _percent(last, "each"),
            _percent(last, "all"),
        ])  # fmt: skip
    header = ("", "steps", "TFLOP", "CPU minutes", "validation loss", "attributes right, %",
              "all right, %")  # fmt: skip
    return table(header, rows) + "\n\n" + _conditions(report, "one object at 32x32, 9 frames")


def events(report: Mapping[str, Any], table: Table) -> str:
    """The curve: what the judge says after every budget."""
    (run,) = report["arms"]["continued"]["runs"]
    names = [name for name in run[-1] if name.endswith("_all")]
    rows = [
        [f"{row['budget'] / 60:g}", f"{row['step']}", f"{row['loss']:.4f}",
         *(_event(row, name.removesuffix("_all")) for name in names)]
        for row in run
    ]  # fmt: skip
    ceilings = [_event(report["ceilings"], name.removesuffix("_all")) for name in names]
    rows.append(["VAE ceiling", "", "", *ceilings])
    titles = [name.removesuffix("_all").replace("_", " ") for name in names]
    header = ("CPU minutes", "steps", "validation loss", *titles)
    told = "all right; of events also: how often one happened, and was right then"
    return table(header, rows) + "\n\n" + _conditions(report, told)


def _event(row: Mapping[str, Any], name: str) -> str:
    text = f"{100 * row[f'{name}_all']:.0f}%"
    happened = row.get(f"{name}_event_happened")
    if happened is None:
        return text
    right = row.get(f"{name}_event_right")
    return f"{text}; {100 * happened:.0f}%, " + ("-" if right is None else f"{100 * right:.0f}%")


def _conditions(report: Mapping[str, Any], more: str) -> str:
    count = len(report["seeds"])
    seeds = f"{count} seeds, mean and range" if count > 1 else "one seed"
    made = f"one thread, torch {report['torch']}"
    return f"{seeds}; {more}; {made}; {report['clips_read']} clips read by oracle " + (
        f"{report['judge']['oracle']} at every look."
    )
