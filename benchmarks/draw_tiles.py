"""Draws tile order and a window, from the layout itself: `python -m benchmarks.draw_tiles --out F`.

Every number and every run in the picture comes from `sora_kernels.packing`, none is typed in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_kernels import Grid, PackedLayout, Window
from sora_kernels.bench.plot import save
from sora_kernels.packing.windows import SegmentGrid, seen_ranges

GRID = Grid(4, 7, 14, tile=(1, 2, 3))
WINDOW = Window((3, 3, 3))
QUERY = (1, 2, 1)
CORNER = (0, 0, 4)
INK, PALE, LINE = "#24292f", "#f6f8fa", "#afb8c1"
QUERY_COLOUR, CORNER_COLOUR = "#cf222e", "#bf8700"
FRAMES = ("#1f6feb", "#2da44e", "#8250df", "#0a7d8c")


def number_of(grid: SegmentGrid, index: tuple[int, int, int]) -> int:
    _, h, w = grid.counts
    return (index[0] * h + index[1]) * w + index[2]


def edges(size: int, step: int) -> list[int]:
    return [*range(0, size, step), size]


def tile_box(grid: SegmentGrid, i: int, j: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the tile (i, j) of a frame, in tokens."""
    (_, h, w), (_, b, c) = grid.grid, grid.tile
    return j * c, i * b, min(c, w - j * c), min(b, h - i * b)


def frame(axes: Any, grid: SegmentGrid, title: str) -> None:
    """An empty frame with its tiles."""
    from matplotlib.patches import Rectangle

    _, rows, columns = grid.counts
    for i in range(rows):
        for j in range(columns):
            left, top, width, height = tile_box(grid, i, j)
            box = Rectangle((left, top), width, height, facecolor=PALE, edgecolor=LINE, lw=1.0)
            axes.add_patch(box)
    axes.set_xlim(-0.15, grid.grid[2] + 0.15)
    axes.set_ylim(grid.grid[1] + 0.15, -0.15)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=4)


def draw_order(axes: Any, grid: SegmentGrid, layout: PackedLayout) -> None:
    """The first frame, each token with its place in memory, and the way through its tiles."""
    from matplotlib.patches import Rectangle

    _, h, w = grid.grid
    frame(axes, grid, "Frame 0: where each token is stored")
    places = layout.coordinates().numpy()[: h * w]
    _, rows, columns = grid.counts
    for i in range(rows):
        for j in range(columns):
            left, top, width, height = tile_box(grid, i, j)
            shade = FRAMES[0] if (i + j) % 2 else "#54aeff"
            axes.add_patch(Rectangle((left, top), width, height, facecolor=shade, alpha=0.16, lw=0))
    for at, (_, y, x) in enumerate(places):
        axes.text(x + 0.5, y + 0.52, str(at), ha="center", va="center", fontsize=7.5, color=INK)
    path = places[:, 1:] + 0.5
    axes.plot(path[:, 1], path[:, 0], color=FRAMES[0], lw=5, alpha=0.13, solid_joinstyle="round")


def draw_frame(axes: Any, grid: SegmentGrid, t: int, runs: list[tuple[int, int]]) -> None:
    """Frame `t` with the runs of the window in it and, outlined, the window of the corner tile."""
    from matplotlib.patches import Rectangle

    _, h, w = grid.grid
    frame(axes, grid, f"Frame {t}")
    _, rows, columns = grid.counts
    tiles = {
        number: (i, j)
        for i in range(rows)
        for j in range(columns)
        for number in [number_of(grid, (t, i, j))]
    }
    for number, (i, j) in tiles.items():
        first, stop = grid.tile_tokens(number)
        for label, (low, high) in enumerate(runs, 1):
            if low <= first and stop <= high:
                left, top, width, height = tile_box(grid, i, j)
                axes.add_patch(
                    Rectangle(
                        (left, top + 0.12), width, height - 0.24, facecolor=FRAMES[t], alpha=0.5,
                        lw=0,
                    )
                )  # fmt: skip
                if low == first:
                    axes.text(
                        left + 0.25, top + height / 2, f"run {label}:  {low} - {high - 1}",
                        va="center", fontsize=8.5, color=INK, fontweight="bold", zorder=6,
                    )  # fmt: skip
    clamped = seen_ranges(grid, number_of(grid, CORNER), WINDOW)
    boxes = [
        tile_box(grid, *place)
        for number, place in tiles.items()
        if any(a <= grid.tile_tokens(number)[0] < b for a, b in clamped)
    ]
    if boxes:
        left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
        right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
        axes.add_patch(
            Rectangle(
                (left + 0.06, top + 0.06), right - left - 0.12, bottom - top - 0.12, fill=False,
                edgecolor=CORNER_COLOUR, lw=1.8, ls=(0, (4, 2)),
            )
        )  # fmt: skip
    for index, colour in ((QUERY, QUERY_COLOUR), (CORNER, CORNER_COLOUR)):
        if index[0] == t:
            left, top, width, height = tile_box(grid, *index[1:])
            axes.add_patch(
                Rectangle((left, top), width, height, fill=False, edgecolor=colour, lw=3, zorder=5)
            )


def draw_memory(axes: Any, grid: SegmentGrid, runs: list[tuple[int, int]]) -> None:
    """The segment as it lies in memory."""
    from matplotlib.patches import Rectangle

    per_frame = grid.grid[1] * grid.grid[2]
    for t in range(grid.grid[0]):
        left = t * per_frame
        axes.add_patch(Rectangle((left, 0), per_frame, 1, facecolor=PALE, edgecolor=LINE, lw=1))
        axes.text(
            left + per_frame / 2, -0.28, f"frame {t}", ha="center", va="center", fontsize=9,
            color=INK,
        )  # fmt: skip
    for label, (low, high) in enumerate(runs, 1):
        colour = FRAMES[low // per_frame]
        axes.add_patch(Rectangle((low, 0), high - low, 1, facecolor=colour, alpha=0.5, lw=0))
        axes.text(
            (low + high) / 2, 0.5, str(label), ha="center", va="center", fontsize=9.5, color=INK,
            fontweight="bold",
        )  # fmt: skip
    first, stop = grid.tile_tokens(number_of(grid, QUERY))
    axes.add_patch(
        Rectangle((first, -0.05), stop - first, 1.1, fill=False, edgecolor=QUERY_COLOUR, lw=2.4)
    )
    axes.set_xlim(-2, grid.stop + 2)
    axes.set_ylim(-0.5, 1.15)
    axes.axis("off")
    keys = sum(high - low for low, high in runs)
    axes.set_title(
        f"In memory: {keys} of {grid.length} keys, read as {len(runs)} contiguous runs, "
        "found by arithmetic",
        fontsize=10, color=INK, loc="left", pad=4,
    )  # fmt: skip


def draw(path: Path) -> Path:
    """The whole picture as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout = PackedLayout([[GRID]], order="tile", device="cpu")
    length, (row,) = layout.num_tokens, layout.window_table().tolist()
    grid = SegmentGrid(length, row[0], (row[1], row[2], row[3]), (row[4], row[5], row[6]))
    runs = seen_ranges(grid, number_of(grid, QUERY), WINDOW)
    figure = pyplot.figure(figsize=(14.2, 7.0), facecolor="white")
    places = figure.add_gridspec(3, 3, height_ratios=(1, 1, 0.36), hspace=0.22, wspace=0.07)
    draw_order(figure.add_subplot(places[0, 0]), grid, layout)
    slots = (places[0, 1], places[0, 2], places[1, 1], places[1, 2])
    for t, slot in enumerate(slots):
        draw_frame(figure.add_subplot(slot), grid, t, runs)
    words = figure.add_subplot(places[1, 0])
    words.axis("off")
    (t, h, w), (a, b, c) = grid.grid, grid.tile
    lines = (
        (INK, f"{t} x {h} x {w} tokens (t, h, w) in tiles of {a} x {b} x {c},\n"
              "stored one after another along w, h, t.\nPartial tiles are not padded."),
        (QUERY_COLOUR, "A query tile sees a window of 3 x 3 x 3 tiles.\n"
                       "Tiles side by side along w are one run of tokens."),
        (CORNER_COLOUR, "The window of a tile in a corner (dashed) is\n"
                        "moved inwards and keeps its size."),
    )  # fmt: skip
    y = 0.97
    for colour, text in lines:
        words.text(0.0, y, "■", fontsize=12, color=colour, va="top")
        words.text(0.06, y, text, fontsize=9.8, color=INK, va="top", linespacing=1.4)
        y -= 0.17 + 0.105 * text.count("\n")
    draw_memory(figure.add_subplot(places[2, :]), grid, runs)
    try:
        return save(figure, path)
    finally:
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.draw_tiles", description="The picture of tile order."
    )
    parser.add_argument("--out", metavar="PNG", required=True, help="where to draw")
    out = Path(parser.parse_args(argv).out)
    if not out.parent.is_dir() or out.is_dir():
        print(f"benchmarks.draw_tiles: --out: cannot write {out}", file=sys.stderr)
        return 2
    print(draw(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
