"""One row per mode: `python -m model.modes_sheet -o docs/images/modes.png`.

All rows are jobs of one pack. Known frames have a yellow frame; they come from one scene of the
world that no training has seen, and no row is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from model import modes
from model.cli import Parser, positive, run, seed_number
from model.files import write_beside
from model.modes import Job
from model.sample import Sampling
from model.stack import CHECKPOINT, Size, load_stack
from model.video import to_uint8
from model.world import captions, render, sample_scene

SIZE = Size(32, 32, 9)
GOLD = (255, 190, 0)
SHOWN = 3  # known frames that are shown beside what is made


@dataclass(frozen=True)
class Row:
    """A job, and known frames [3, T, H, W] to show before and behind its clip."""

    title: str
    job: Job
    before: Tensor | None = None
    after: Tensor | None = None


def rows(seed: int) -> list[Row]:
    """Every mode, on three times nine frames of one scene: before, now, after."""
    rng = np.random.default_rng([seed, 21])
    scene = sample_scene(rng, kind="one", size=(32, 32), frames=27)
    prompt, video = captions(scene)[0], render(scene)
    before, now, after = video.split(9, 1)
    ends = {k: now[:, k : k + 1] for k in (0, 8)}
    return [
        Row("text to video", modes.text_to_video(prompt, SIZE, seed)),
        Row("text to image", modes.text_to_video("image of a green cross", Size(48, 32, 1), seed)),
        Row("image to video", modes.image_to_video(prompt, SIZE, now[:, :1], seed)),
        Row("extend forward", modes.extend(prompt, SIZE, before, seed=seed), before[:, -SHOWN:]),
        Row("extend backward", modes.extend(prompt, SIZE, after, "backward", seed=seed), None,
            after[:, :SHOWN]),
        Row("connect", modes.connect(prompt, SIZE, before, after, seed=seed),
            before[:, -SHOWN:], after[:, :SHOWN]),
        Row("fill", modes.fill(prompt, SIZE, ends, seed)),
        Row("4x the frames", modes.super_resolve(prompt, now[:, ::4], 4, seed)),
        Row("edit, strength 0.7", modes.edit(recoloured(prompt), now, 0.7, seed), now),
        Row("loop", modes.loop("a red circle bouncing off the wall", Size(32, 32, 16), seed)),
    ]  # fmt: skip


def recoloured(prompt: str) -> str:
    """The prompt with another colour."""
    colour = prompt.split()[1]
    return prompt.replace(colour, "green" if colour != "green" else "red")


def strip(row: Row, clip: Tensor) -> list[tuple[np.ndarray, bool]]:
    """Frames uint8 [H, W, 3] in the order of time, and whether they are known."""
    known = {int(part.time) for part in row.job.given if 0 <= part.time < clip.shape[1]}
    frames = [(frame, k in known) for k, frame in enumerate(to_uint8(modes.paste(row.job, clip)))]
    sides = [[] if side is None else [(frame, True) for frame in to_uint8(side)]
             for side in (row.before, row.after)]  # fmt: skip
    return [*sides[0], *frames, *sides[1]]


def canvas(strips: Sequence[Sequence[tuple[np.ndarray, bool]]]) -> tuple[np.ndarray, list[int]]:
    """All frames as one picture uint8 [H, W, 3], and where its rows begin."""
    border, title = 2, 12
    heights = [row[0][0].shape[0] + 2 * border + title for row in strips]
    width = max(sum(frame.shape[1] + 3 * border for frame, _ in row) for row in strips)
    sheet = np.full((sum(heights), width, 3), 255, dtype=np.uint8)
    tops = [int(top) for top in np.cumsum([0, *heights[:-1]])]
    for top, row in zip(tops, strips, strict=True):
        left = border
        for frame, known in row:
            framed = np.pad(frame, ((border, border), (border, border), (0, 0)))
            inside = np.pad(np.ones(frame.shape[:2], dtype=bool), border)
            framed[~inside] = GOLD if known else 255
            at = slice(top + title, top + title + framed.shape[0])
            sheet[at, left : left + framed.shape[1]] = framed
            left += frame.shape[1] + 3 * border
    return sheet, tops


def draw(path: Path, drawn: Sequence[Row], clips: Sequence[Tensor]) -> None:
    """Writes the sheet as PNG."""
    sheet, tops = canvas([strip(row, clip) for row, clip in zip(drawn, clips, strict=True)])
    inches = (sheet.shape[1] / 50, sheet.shape[0] / 50)
    figure = plt.figure(figsize=inches)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    for top, row in zip(tops, drawn, strict=True):
        axes.text(3, top + 2, f"{row.title}: {row.job.prompt}", va="top", fontsize=10)
    write_beside(path, lambda beside: figure.savefig(beside, dpi=100, format="png"))
    plt.close(figure)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.modes_sheet", description="Draw a clip of every mode.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--steps", type=positive, default=Sampling.steps, help="Euler steps")
    args = parser.parse_args(argv)
    drawn = rows(args.seed)
    stack = load_stack(args.checkpoint)
    clips = modes.run(stack, [row.job for row in drawn], Sampling(args.steps))
    draw(args.out, drawn, clips)
    print(args.out)


if __name__ == "__main__":
    run("python -m model.modes_sheet", main)
