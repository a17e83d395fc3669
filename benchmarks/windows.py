"""How the time of attention grows with the video: `python -m benchmarks.windows --json F`.

One video after another, each twice as long as the last, under a window of fixed size and without
one, in turn in one process. `--plot PNG` draws the report; `--redraw` reads it, measuring nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pinned import PINNED, pin

if TYPE_CHECKING:
    from sora_kernels import PackedLayout

# 864 keys for each query, from the second size on: 27 tiles of 32.
TILE, WINDOW = (2, 4, 4), (3, 3, 3)
HEADS, WIDTH = 2, 64
GRIDS = ((6, 12, 16), (8, 16, 16), (8, 16, 32), (16, 16, 32), (16, 32, 32))
QUICK = ((6, 12, 12), (6, 12, 24))
NAMES = {"sora_kernels": "window", "dense": "no window"}


def layout_of(grid: tuple[int, int, int]) -> PackedLayout:
    from sora_kernels import Grid, PackedLayout

    return PackedLayout([[Grid(*grid, tile=TILE)]], order="tile", device="cpu")


def measure_all(grids: Sequence[tuple[int, int, int]], seconds: float) -> list[dict[str, Any]]:
    """Rows of the report."""
    import torch

    from sora_kernels import Window, packed_attention
    from sora_kernels.bench import measure
    from sora_kernels.bench.memory import peak_mem_mb
    from sora_kernels.bench.schema import make_row

    from .registry import backward, forward

    rows: list[dict[str, Any]] = []
    for grid in grids:
        layout = layout_of(grid)
        n = layout.num_tokens
        torch.manual_seed(0)
        q, k, v = torch.randn(n, 3, HEADS, WIDTH).unbind(1)
        inputs = {"q": q, "k": k, "v": v}
        calls = {
            "sora_kernels": partial(packed_attention, layout=layout, window=WINDOW),
            "dense": partial(packed_attention, layout=layout),
        }
        pairs = {"sora_kernels": layout.window_pairs(Window(WINDOW)), "dense": n * n}
        for mode, build, factor in (
            ("fwd", forward, 4.0), ("bwd", partial(backward, grads=("q", "k", "v")), 10.0),
        ):  # fmt: skip
            runs = {name: build(call)(inputs) for name, call in calls.items()}
            samples = measure(runs, seconds=seconds)
            for name, times in samples.items():
                others = {o: t for o, t in samples.items() if o != name} if name != "dense" else {}
                rows.append(
                    make_row(
                        suite="windows", op="packed_attention", mode=mode, case=f"{n} tokens",
                        dtype="fp32", provider=name, samples_ms=times,
                        bytes=(4 if mode == "fwd" else 8) * n * HEADS * WIDTH * 4,
                        flops=int(factor * pairs[name] * HEADS * WIDTH), ceilings=ceilings(),
                        peak_mem_mb=peak_mem_mb(runs[name], "cpu"), paired_with=others,
                        extra={"tokens": n, "pairs": pairs[name]},
                    )
                )  # fmt: skip
        print(f"{n} tokens measured", file=sys.stderr)
    return rows


_ceilings: list[Any] = []


def ceilings() -> Any:
    """Measured once."""
    from sora_kernels.bench import measure_ceilings

    if not _ceilings:
        _ceilings.append(measure_ceilings("cpu", quick=True))
    return _ceilings[0]


def curves(report: Mapping[str, Any], mode: str) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and milliseconds of each provider."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in report["rows"]:
        if row["mode"] == mode:
            tokens, times = found.setdefault(row["provider"], ([], []))
            tokens.append(row["tokens"])
            times.append(row["p50_ms"])
    return found


def exponent(tokens: Sequence[int], times: Sequence[float]) -> float:
    """Slope of time over tokens on logarithmic axes, by least squares."""
    x, y = [math.log(n) for n in tokens], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - mean_x) ** 2 for a in x)


def plot(report: Mapping[str, Any], path: Path) -> Path:
    """Time over tokens, logarithmic, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from sora_kernels.bench.plot import COLOURS, OTHER_COLOURS, caption, save

    colours = {"sora_kernels": COLOURS["sora_kernels"], "dense": OTHER_COLOURS[2]}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, mode in zip(panels, ("fwd", "bwd"), strict=True):
        for provider, (tokens, times) in curves(report, mode).items():
            label = f"{NAMES[provider]}: tokens$^{{{exponent(tokens, times):.2f}}}$"
            axes.loglog(tokens, times, "o-", color=colours[provider], lw=2, label=label)
        axes.set_title({"fwd": "forward", "bwd": "backward"}[mode], fontsize=11)
        axes.set_xlabel("tokens of one video")
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds")
    size = "x".join(map(str, WINDOW))
    tile = "x".join(map(str, TILE))
    text = f"window of {size} tiles of {tile} · {HEADS} heads of {WIDTH}, fp32 · {caption(report)}"
    figure.text(0.01, -0.03, text, fontsize=6.5, color="#57606a")
    try:
        return save(figure, path)
    finally:
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.windows", description=__doc__)
    parser.add_argument("--json", metavar="F", required=True, help="the report")
    parser.add_argument("--plot", metavar="PNG", help="draw it")
    parser.add_argument(
        "--redraw", action="store_true", help="read the report instead of measuring"
    )
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    options = parser.parse_args(argv)
    for name in ("json", "plot"):
        path = Path(getattr(options, name) or ".")
        if getattr(options, name) and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            print(f"benchmarks.windows: --{name}: cannot write {path}", file=sys.stderr)
            return 2

    from sora_kernels.bench import SCHEMA, read_report, write_report
    from sora_kernels.bench.env import describe

    if options.redraw:
        try:
            report = read_report(options.json)
        except ValueError as error:
            print(f"benchmarks.windows: --json: {error}", file=sys.stderr)
            return 2
    else:
        rows = measure_all(QUICK if options.quick else GRIDS, 0.05 if options.quick else 2.0)
        env = describe("cpu", quick=options.quick, variables=PINNED)
        report = {"schema": SCHEMA, "env": env, "ceilings": ceilings().as_dict(), "rows": rows}
        write_report(options.json, report)
    for mode in ("fwd", "bwd"):
        for provider, (tokens, times) in curves(report, mode).items():
            shown = "  ".join(f"{n}: {t:.1f} ms" for n, t in zip(tokens, times, strict=True))
            print(f"{mode} {NAMES[provider]:10} tokens^{exponent(tokens, times):.2f}  {shown}")
    if options.plot:
        print(plot(report, Path(options.plot)))
    return 0


if __name__ == "__main__":
    pin(sys.argv[1:], "benchmarks.windows")
    sys.exit(main())
