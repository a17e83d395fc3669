"""The tables of the judge: scores of the checkpoint and the certificate of the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
# What a row shows besides "all": what its mode is about.
OF_A_MODE = ("first_frame_db", "first_frame_and_all", "seam_and_all", "gain_db", "edited",
             "event_happened", "event_right", "last_quarter_all")  # fmt: skip


def scores(report: Mapping[str, Any], table: Table) -> str:
    """Generated clips, ceilings and the best floor, of every row and metric that counts."""
    rows = []
    for row in report["rows"]:
        where = f"{row['name']} ({row['size']}, {row['frames']} frames, n={row['clips']})"
        for name in ("all", *OF_A_MODE):
            metric = row["metrics"].get(name)
            if metric is None:
                continue
            floors = {k: v for k, v in metric["floors"].items() if v is not None}
            best = max(floors, key=lambda k: floors[k]["value"], default=None)
            rows.append(
                [
                    where,
                    name + (" (void)" if metric["void"] else ""),
                    _show(metric["generated"], metric["unit"]),
                    _show(metric.get("pasted"), metric["unit"]),
                    _show(metric["ceilings"]["vae"], metric["unit"], short=True),
                    _show(metric["ceilings"]["true"], metric["unit"], short=True),
                    "-"
                    if best is None
                    else f"{_show(floors[best], metric['unit'], short=True)} {best}",
                    f"{100 * row['chance']:.1f}%" if name == "all" else "",
                ]
            )
            where = ""
    header = ("row", "metric", "generated", "pasted", "VAE ceiling", "true clip", "best floor",
              "chance")  # fmt: skip
    return table(header, rows) + f"\n\nOracle {report['judge']['oracle']}, seed {report['seed']}."


def headline_scores(report: Mapping[str, Any], table: Table) -> str:
    """Everything right jointly: one line a row, between its ceiling and its best floor."""
    rows = []
    for row in report["rows"]:
        metric = row["metrics"]["all"]
        floors = [value["value"] for value in metric["floors"].values() if value is not None]
        rows.append(
            [
                f"{row['name']} ({row['size']}, {row['frames']} frames, n={row['clips']})",
                _show(metric["generated"], "rate") + (" (void)" if metric["void"] else ""),
                _show(metric["ceilings"]["vae"], "rate", short=True),
                f"{100 * max(floors):.0f}%" if floors else "-",
                f"{100 * row['chance']:.1f}%",
            ]
        )
    header = ("row", "all right", "VAE ceiling", "best floor", "chance")
    return table(header, rows) + f"\n\nOracle {report['judge']['oracle']}, seed {report['seed']}."


def expansion(report: Mapping[str, Any], table: Table) -> str:
    """Short prompts and their expansions, on the same scenes and noise: rates and difference."""
    rows = []
    for row in report["rows"]:
        where = f"{row['name']} ({row['size']}, {row['frames']} frames, n={row['clips']})"
        for wish, names in (
            ("short", ("all",)),
            ("expanded", ("all", "size", "speed", "background")),
        ):
            for name in names:
                metric = row[f"{wish}_wishes"][name]
                change = metric["paired"]
                low, middle, high = (100 * change[k] for k in ("low", "difference", "high"))
                rows.append(
                    [
                        where,
                        f"{name} of the {wish} prompt",
                        _show(metric["short"], "rate"),
                        _show(metric["expanded"], "rate"),
                        f"{middle:+.0f} [{low:+.0f}, {high:+.0f}]",
                        f"{change['p']:.2g}",
                        _show(metric.get("vae"), "rate", short=True),
                        _show(metric.get("shuffled"), "rate", short=True),
                    ]
                )
                where = ""
    header = ("row", "asked for", "short prompts", "expanded prompts", "difference, points", "p",
              "VAE ceiling", "shuffled floor")  # fmt: skip
    return table(header, rows) + f"\n\nOracle {report['judge']['oracle']}, seed {report['seed']}."


def _show(value: Mapping[str, float] | None, unit: str, short: bool = False) -> str:
    if value is None:
        return "-"
    factor, digits, sign = (100, 0, "%") if unit == "rate" else (1, 1, " dB")
    if unit == "ratio":
        digits, sign = 2, ""
    middle, low, high = (factor * value[name] for name in ("value", "low", "high"))
    text = f"{middle:.{digits}f}{sign}"
    return text if short else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def certificate(report: Mapping[str, Any], table: Table) -> str:
    """How often the oracle is right, and how often it lets a wrong clip pass."""
    rows = []
    for part in report["parts"]:
        where = f"{part['kind']} ({part['size']}, {part['frames']} frames, n={part['clips']})"
        accepts = part["false_accept"]
        worst = max(accepts, key=lambda name: accepts[name]["value"])
        for name, source in part["sources"].items():
            position = source.get("position", {})
            rows.append(
                [
                    where,
                    name,
                    _show(source["all"], "rate"),
                    _show(source["shape"], "rate", short=True),
                    _show(source["readable"], "rate", short=True),
                    f"{position['position_median']:.2f} / {position['position_p99']:.2f}"
                    if "position_median" in position
                    else "-",
                    f"{100 * accepts[worst]['value']:.1f}% "
                    f"[{100 * accepts[worst]['low']:.1f}, {100 * accepts[worst]['high']:.1f}] "
                    f"{worst}"
                    if name == "true"
                    else "",
                ]
            )
            where = ""
    header = ("scenes", "source", "all right", "shape", "readable", "position, px (median / 99%)",
              "false accept, worst attribute")  # fmt: skip
    return table(header, rows) + f"\n\nOracle {report['judge']['oracle']}."
