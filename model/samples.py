"""The picture in README: `python -m model.samples -o docs/images/samples.png`.

One row a prompt, all generated in one pack, at several sizes; the seed is fixed and no clip is
chosen by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from model.cli import Parser, run, seed_number
from model.files import write_beside
from model.modes import run as make
from model.modes import text_to_video
from model.stack import CHECKPOINT, Size, load_stack
from model.video import to_uint8

PROMPTS: tuple[tuple[str, Size], ...] = (
    ("a red circle moving left", Size(32, 32, 9)),
    ("a blue square moving right", Size(32, 32, 9)),
    ("a green triangle moving up", Size(32, 32, 9)),
    ("a yellow cross moving down", Size(32, 32, 9)),
    ("a red square moving up-left", Size(32, 32, 9)),
    ("a green circle moving right", Size(48, 32, 9)),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.samples", description="Draw clips of several prompts.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args(argv)
    stack = load_stack(args.checkpoint)
    prompts = [prompt for prompt, _ in PROMPTS]
    jobs = [text_to_video(*wanted, args.seed + i) for i, wanted in enumerate(PROMPTS)]
    clips = make(stack, jobs)
    columns = max(clip.shape[1] for clip in clips)
    figure, axes = plt.subplots(
        len(clips), columns, figsize=(columns * 1.05, len(clips) * 1.2), squeeze=False
    )
    for row, prompt, clip in zip(axes, prompts, clips, strict=True):
        for axis in row:
            axis.axis("off")
        for axis, frame in zip(row, to_uint8(clip), strict=False):
            axis.imshow(frame, interpolation="nearest")
        row[0].set_title(prompt, loc="left", fontsize=9)
    figure.tight_layout(pad=0.4)
    write_beside(args.out, lambda beside: figure.savefig(beside, dpi=90, format="png"))
    print(args.out)


if __name__ == "__main__":
    run("python -m model.samples", main)
