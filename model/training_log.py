"""The log of a training: loss, loss per decile of t, and speed, a row every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from model.data import Batch
from model.files import write_beside
from model.flow import DECILES, loss_by_decile, mean_of_deciles
from model.speed import Machine


@dataclass
class Window:
    """What a row of the log sums up."""

    losses: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * DECILES)
    counts: list[int] = field(default_factory=lambda: [0] * DECILES)
    tokens: int = 0
    clips: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass
class Log:
    """The loss curve: mean loss, loss per decile of t, and speed, every few steps.

    Speed is tokens per second and flops_per_second: the model's own arithmetic, forward and
    backward, 2 FLOP per multiply-accumulate (`model.budget`). Where the machine is known, a row
    says what share that is: matmul_share of the rate of a matrix product measured when the run
    began or was resumed, and, on a GPU whose datasheet is known, mfu of its dense peak
    (`model.speed`). Rows of logs from before these existed stay without them.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    window: Window = field(default_factory=Window)
    machine: Machine | None = None

    def add(self, loss: float, per_clip: Tensor, batch: Batch, seconds: float, flops: int) -> None:
        """Counts one step of `flops` floating point operations."""
        window = self.window
        sums, counts = loss_by_decile(per_clip, batch.times)
        window.losses.append(loss)
        window.sums = [a + b for a, b in zip(window.sums, sums, strict=True)]
        window.counts = [a + b for a, b in zip(window.counts, counts, strict=True)]
        window.tokens += batch.layout.num_tokens
        window.clips += batch.layout.num_segments
        window.flops += flops
        window.seconds += seconds
        self.seconds += seconds

    def close_row(self, step: int) -> dict[str, Any]:
        """Ends a row at `step` and returns it."""
        window, self.window = self.window, Window()
        deciles = mean_of_deciles(window.sums, window.counts)
        seconds = max(window.seconds, 1e-9)
        speed = window.flops / seconds
        row = {
            "step": step,
            "loss": round(sum(window.losses) / len(window.losses), 5),
            "loss_by_decile": [None if x is None else round(x, 5) for x in deciles],
            "clips": window.clips,
            "tokens_per_second": round(window.tokens / seconds),
            "flops_per_second": round(speed),
            **({} if self.machine is None else self.machine.shares(speed)),
            "minutes": round(self.seconds / 60, 3),
        }
        self.rows.append(row)
        return row


def speed_of(row: Mapping[str, Any]) -> str:
    """A row's speed for people."""
    text = f"{row['tokens_per_second']} tokens/s  {row['flops_per_second'] / 1e9:.3g} GFLOP/s"
    shares = [f"{name} {row[name]:.1%}" for name in ("mfu", "matmul_share") if name in row]
    return f"{text} ({', '.join(shares)})" if shares else text


def plot_log(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the loss and its deciles over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.plot(steps, [row["loss"] for row in rows])
    left.set(xlabel="step", ylabel="loss (velocity MSE)", yscale="log")
    last = rows[-max(1, len(rows) // 10) :]
    means = []
    for k in range(DECILES):
        seen = [row["loss_by_decile"][k] for row in last if row["loss_by_decile"][k] is not None]
        means.append(sum(seen) / len(seen) if seen else float("nan"))
    right.bar([(k + 0.5) / DECILES for k in range(DECILES)], means, width=0.08)
    right.set(xlabel="time t (0 clean, 1 noise)", ylabel="loss, last tenth of the run")
    write_beside(path, lambda beside: figure.savefig(beside, dpi=100, format="png"))
    plt.close(figure)
