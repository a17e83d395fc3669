"""The picture of docs/how-it-works.md: `python -m model.walk -o docs/images/how-it-works.png`.

A clip, its latents, its way into noise, the walk of a sampler from noise to a clip, and the tokens
of a pack. Everything is computed by the stack; nothing is drawn by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from model.cli import Parser, run
from model.condition import Given, clip_segment
from model.files import write_beside
from model.flow import euler_times, interpolate, size_shift
from model.sample import DEFAULT, Request, euler, guided, start_noise
from model.stack import CHECKPOINT, Stack, load_stack
from model.video import to_uint8
from model.world import captions, render, sample_scene
from sora_kernels.packing import Part, Text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROMPT, LATENT, SEED = "a red circle moving left", (3, 4, 4), 0
COLOURS = {"words": "#e3b341", "given": "#3fb950", "to make": "#539bf5"}


@torch.no_grad()
def estimates(stack: Stack) -> list[Tensor]:
    """What the sampler expects of the clip at each of its steps: `x - t v`, decoded."""
    config, seen = stack.dit.config, []
    request = Request(stack.words.encode(PROMPT, config.max_words), LATENT, SEED)
    velocity = guided(stack.dit, [request], DEFAULT.guidance)

    def watched(parts: list[Tensor], times: Tensor) -> list[Tensor]:
        v = velocity(parts, times)
        seen.append(parts[0] - float(times[0]) * v[0])
        return v

    shift = size_shift(int(np.prod(LATENT)), config.base_tokens, DEFAULT.shift)
    schedule = euler_times(DEFAULT.steps, shift)[:, None]
    euler(watched, [start_noise(config.channels, LATENT, SEED)], [0], schedule)
    return stack.decode(seen)


def pack(words: int) -> list[list[Part]]:
    """A video, a video with its first frame given, and an image."""
    frame = Given(torch.zeros(16, 1, 4, 6), time=0)
    sizes: tuple[tuple[tuple[int, int, int], list[Given]], ...] = (
        ((3, 4, 6), []), ((3, 4, 6), [frame]), ((1, 8, 8), []),
    )  # fmt: skip
    return [clip_segment(words, latent, (1, 1, 1), given) for latent, given in sizes]


def draw(stack: Stack) -> Any:
    """The figure."""
    scene = sample_scene(np.random.default_rng(3), kind="one", size=(32, 48), frames=9)
    video = render(scene)
    (latent,) = stack.encode([video])
    noise = torch.randn(latent.shape, generator=torch.manual_seed(0))
    times = [k / 8 for k in range(9)]
    noised = stack.decode([interpolate(latent, noise, t) for t in times])
    steps = estimates(stack)

    figure = plt.figure(figsize=(11, 8.2))
    rows = figure.add_gridspec(5, 1, height_ratios=(1, 1.15, 1, 1, 0.5), hspace=0.45)

    def strip(row: int, title: str, pictures: Sequence[np.ndarray], labels: Sequence[str]) -> None:
        cells = rows[row].subgridspec(1, len(pictures), wspace=0.06)
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            axes = figure.add_subplot(cells[number])
            axes.imshow(picture, interpolation="nearest", cmap="gray", aspect="equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(label, fontsize=7)
            if number == 0:
                axes.set_title(title, loc="left", fontsize=9)

    strip(
        0, f'1  the clip: "{captions(scene)[0]}", [3, 9, 32, 48]', list(to_uint8(video)),
        [f"frame {k}" for k in range(9)],
    )  # fmt: skip
    strip(
        1, "2  its latents, [16, 3, 4, 6]: 16 channels each, side by side",
        [montage(latent[:, k]) for k in range(latent.shape[1])],
        ["latent 0: frame 0", "latent 1: frames 1-4", "latent 2: frames 5-8"],
    )  # fmt: skip
    strip(
        2, "5  into noise: (1 - t) x + t noise, frame 4 as the VAE decodes it",
        [to_uint8(clip)[4] for clip in noised], [f"t = {t:g}" for t in times],
    )  # fmt: skip
    strip(
        3, f'7  out of noise: "{PROMPT}", what the sampler expects at each step, frame 4',
        [to_uint8(clip)[4] for clip in steps], [f"step {k + 1}" for k in range(len(steps))],
    )  # fmt: skip
    draw_pack(figure.add_subplot(rows[4]), pack(len(stack.words.encode(captions(scene)[0], 48))))
    return figure


def montage(channels: Tensor) -> np.ndarray:
    """[16, H, W] -> two rows of eight, with lines between them."""
    framed = torch.nn.functional.pad(channels, (1, 1, 1, 1), value=float(channels.min()))
    return torch.cat([torch.cat(list(half), 1) for half in framed.split(8)], 0).numpy()


def draw_pack(axes: Any, segments: Sequence[Sequence[Part]]) -> None:
    """One bar, the tokens of all segments in their order, coloured by what they are."""
    at = 0
    for segment in segments:
        begin = at
        for part in segment:
            text = isinstance(part, Text)
            name = "words" if text else "given" if getattr(part, "given", False) else "to make"
            axes.barh(0, part.num_tokens, left=at, color=COLOURS[name], edgecolor="white", lw=0.5)
            at += part.num_tokens
        axes.text((begin + at) / 2, 0.62, f"{at - begin} tokens", ha="center", fontsize=7)
        axes.plot([begin, begin], [-0.5, 0.8], color="black", lw=1)
    for name, colour in COLOURS.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.legend(ncols=3, fontsize=7, frameon=False, loc="upper right", bbox_to_anchor=(1, -0.1))
    axes.set_title("4  three clips in one sequence, no padding", loc="left", fontsize=9)
    axes.set(xlim=(0, at), ylim=(-0.5, 0.9))
    axes.axis("off")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.walk", description="Draw how a clip comes about.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    args = parser.parse_args(argv)
    figure = draw(load_stack(args.checkpoint))
    try:
        write_beside(
            args.out,
            lambda beside: figure.savefig(beside, dpi=100, format="png", bbox_inches="tight"),
        )
    finally:
        plt.close(figure)
    print(args.out)


if __name__ == "__main__":
    run("python -m model.walk", main)
