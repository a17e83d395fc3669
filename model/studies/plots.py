"""What the studies' pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.files import write_beside


def figure(columns: int) -> tuple[Any, Any]:
    """A figure with a row of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=(3.6 * columns, 3.1), constrained_layout=True)


def band(axes: Any, x: Sequence[float], runs: Sequence[Sequence[float]], label: str) -> None:
    """The mean of the runs with their range."""
    columns = list(zip(*runs, strict=True))
    (line,) = axes.plot(x, [sum(c) / len(c) for c in columns], marker="o", ms=3, label=label)
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)


def bars(axes: Any, values: Mapping[str, Sequence[float]], title: str) -> None:
    """Means as bars, with the range of the seeds."""
    for place, (label, runs) in enumerate(values.items()):
        mean = sum(runs) / len(runs)
        spread = [[mean - min(runs)], [max(runs) - mean]]
        axes.barh(place, mean, height=0.6, xerr=spread, color=f"C{place}", capsize=2)
        axes.text(0, place - 0.32, f" {label}: {mean:.3g}", va="bottom", fontsize=7)
    axes.set(yticks=[], xlabel=title)
    axes.set_ylim(len(values) - 0.6, -0.7)


def save(fig: Any, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all."""
    from matplotlib import pyplot as plt

    write_beside(path, lambda beside: fig.savefig(beside, dpi=110, format="png"))
    plt.close(fig)
