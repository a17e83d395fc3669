"""Plots of a report. They read the JSON and nothing else: no picture without its numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .schema import OURS

COLOURS = {OURS: "#1f6feb", "plain": "#8b949e", "compile": "#d29922"}
OTHER_COLOURS = ("#2da44e", "#8250df", "#cf222e", "#0a7d8c", "#e85aad", "#6e4c1e")


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['mode']}\n{row['case']} {row['dtype']}"


def _colours(providers: Iterable[str]) -> dict[str, str]:
    others = iter(OTHER_COLOURS * 4)
    return {p: COLOURS[p] if p in COLOURS else next(others) for p in providers}


def caption(report: Mapping[str, Any]) -> str:
    """Where and when a report was measured, in one line."""
    env = report["env"]
    where = env.get("gpu") or f"{env.get('cpu')}, {env.get('threads')} threads"
    commit = (env.get("commit") or "no commit")[:10]
    modified = "+changes" if env.get("modified") else ""
    ceilings = report["ceilings"]
    return (
        f"{where} · torch {env.get('torch')} · {commit}{modified} · {env.get('date', '')[:10]} · "
        f"copy {ceilings['copy_gbps']:.0f} GB/s, matmul {ceilings['matmul_tflops']:.2g} TFLOP/s"
    )


def save(figure: Any, path: Path) -> Path:
    """Writes a figure beside ``path`` and renames."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
    os.close(handle)
    try:
        figure.savefig(name, dpi=130, bbox_inches="tight")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _bars(
    report: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    axis: str,
    line: float,
    path: Path,
    form: str,
) -> Path:
    """Horizontal bars: one group per case, one bar per provider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    providers = list(dict.fromkeys(p for values in groups.values() for p in values))
    colours = _colours(providers)
    bars = sum(len(values) for values in groups.values())
    figure = Figure(figsize=(9, 1.2 + 0.24 * bars + 0.28 * len(groups)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    position, ticks = 0.0, []
    for values in groups.values():
        start = position
        for provider, value in values.items():
            axes.barh(position, value, height=0.85, color=colours[provider])
            axes.text(value, position, f" {form.format(value)}", va="center", fontsize=7)
            position += 1
        ticks.append((start + position - 1) / 2)
        position += 1.2
    axes.set_yticks(ticks, list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.axvline(line, color="#57606a", linewidth=0.8, linestyle="--")
    axes.set_xlabel(axis, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=colours[p]) for p in providers]
    axes.legend(handles, providers, fontsize=7, loc="best", frameon=False)
    figure.text(0.01, -0.01, caption(report), fontsize=6, color="#57606a")
    return save(figure, path)


def _cases(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(_label(row), []).append(row)
    return grouped


def _speedups(grouped: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Per case and provider: times as fast as ``plain``, the paired median where there is one."""
    groups = {}
    for label, rows in grouped.items():
        plain = next((row for row in rows if row["provider"] == "plain"), None)
        if plain is None:
            continue
        ours = next((row for row in rows if row["provider"] == OURS), None)
        paired = ours.get("paired", {}).get("plain") if ours else None
        values = {r["provider"]: plain["p50_ms"] / r["p50_ms"] for r in rows if r is not plain}
        if paired:
            values[OURS] = paired["median"]
        groups[label] = values
    return {label: values for label, values in groups.items() if values}


def plot(report: Mapping[str, Any], directory: str | Path, name: str = "benchmark") -> list[Path]:
    """Writes ``<name>.png`` with the speedups of all suites, and two plots per suite.

    ``speedup_<suite>.png`` is against plain PyTorch (in ``e2e`` against the fastest plain way),
    ``roofline_<suite>.png`` is the share of the measured ceiling. A report without a plain
    provider has no speedups, and then no plot of them.
    """
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    everything = _speedups(_cases(report["rows"]))
    if everything:
        title = "Times as fast as plain PyTorch"
        path = out / f"{name}.png"
        written.append(_bars(report, everything, title, "speedup", 1.0, path, "{:.2f}x"))
    for suite in dict.fromkeys(row["suite"] for row in report["rows"]):
        grouped = _cases(row for row in report["rows"] if row["suite"] == suite)
        speedups = _speedups(grouped)
        if speedups:
            path = out / f"speedup_{suite}.png"
            title = f"{suite}: times as fast as plain PyTorch"
            written.append(_bars(report, speedups, title, "speedup", 1.0, path, "{:.2f}x"))
        rooflines = {
            label: {row["provider"]: 100 * row["roofline"] for row in rows}
            for label, rows in grouped.items()
        }
        path = out / f"roofline_{suite}.png"
        title = f"{suite}: share of the measured ceiling (floor / time)"
        written.append(_bars(report, rooflines, title, "percent", 100.0, path, "{:.0f}%"))
    return written
