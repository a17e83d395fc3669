"""A prompt becomes a video: `python -m model.generate "a red circle moving left" -o out.mp4`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import modes
from model.cli import Parser, positive, progress_bar, run
from model.condition import GivenClip
from model.modes import Job
from model.sample import DEFAULT, Sampling
from model.stack import CHECKPOINT, Size, Stack, load_stack
from model.video import contact_sheet, read_image, write_image, write_video

FPS = 8


def generate(
    stack: Stack,
    prompts: Sequence[str],
    sizes: Sequence[Size],
    *,
    seed: int = 0,
    sampling: Sampling = DEFAULT,
    starts: Sequence[Tensor | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Clips [3, T, H, W] in [-1, 1], one per prompt, all sampled in one pack.

    Clip i has the noise of `seed + i`. starts: for each clip its known first frames
    [3, 1 + 4k, H, W], or None.
    """
    jobs = []
    for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        start = None if starts is None else starts[i]
        given = () if start is None else (GivenClip(start, 0),)
        jobs.append(Job(prompt, size, given, seed=seed + i))
    return modes.run(stack, jobs, sampling, progress)


def parse_size(text: str) -> tuple[int, int]:
    """WxH."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 48x32, got {text!r}")
    return int(width), int(height)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.generate", description="Make a video from a prompt.")
    parser.add_argument("prompt", help='such as "a red circle moving left"')
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a .mp4, or a .png for images"
    )
    parser.add_argument("--size", type=parse_size, help="WIDTHxHEIGHT, multiples of 8 (32x32)")
    parser.add_argument("--frames", type=positive, default=9, help="1 + 4k; 1 is an image (9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive, default=Sampling.steps, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance, help="1 = none")
    parser.add_argument("--image", type=Path, help="first frame; the size follows it")
    parser.add_argument("--frames-png", type=Path, help="also write all frames side by side")
    parser.add_argument("--zoom", type=positive, default=1, help="pixels per pixel in the output")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".mp4", ".png"):
        raise ValueError(f"--out: expected a name that ends in .mp4 or .png, got {args.out}")
    if args.out.suffix.lower() == ".png" and args.frames != 1:
        raise ValueError(f"--out: a .png holds one frame, got --frames {args.frames}")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance: expected a finite number, got {args.guidance}")
    image = None
    if args.image is not None and args.frames == 1:
        raise ValueError("--image: expected --frames 5 or more to continue it, got 1")
    if args.image is not None:
        image = read_image(args.image)
        inside = tuple(image.shape[:1:-1])
        if args.size not in (None, inside):
            raise ValueError(f"--size: expected the size of --image, {inside}, got {args.size}")
        args.size = inside
    width, height = args.size or (32, 32)
    size = Size(width, height, args.frames)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stack = load_stack(args.checkpoint, device)
    stack.words.encode(args.prompt, stack.dit.config.max_words)
    with progress_bar(args.quiet) as bar:
        task = bar.add_task("sampling", total=args.steps)
        (clip,) = generate(
            stack,
            [args.prompt],
            [size],
            seed=args.seed,
            sampling=Sampling(args.steps, args.guidance),
            starts=[image],
            progress=lambda done: bar.update(task, completed=done),
        )
    if args.out.suffix.lower() == ".png":
        write_image(args.out, clip, args.zoom)
    else:
        write_video(args.out, clip, FPS, args.zoom)
    if args.frames_png is not None:
        contact_sheet(args.frames_png, [clip], scale=6)
    print(args.out)


if __name__ == "__main__":
    run("python -m model.generate", main)
