"""A prompt becomes a video: `python -m model.generate "a red circle moving left" -o out.mp4`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import load_dit
from model.cli import Parser, positive, progress_bar, run
from model.condition import Given
from model.dit import DiT
from model.sample import DEFAULT, Request, Sampling, sample
from model.text import Vocabulary
from model.vae import SPACE_STRIDE, TIME_STRIDE, VideoVAE, load_vae
from model.video import contact_sheet, read_image, write_image, write_video

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny"
MIN_SIDE, MAX_SIDE, MAX_FRAMES = 16, 2048, 1 + 4 * 256
FPS = 8


@dataclass(frozen=True)
class Size:
    """Pixels and frames of a clip that the VAE can hold."""

    width: int
    height: int
    frames: int

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value % SPACE_STRIDE or not MIN_SIDE <= value <= MAX_SIDE:
                raise ValueError(
                    f"--size: expected a {name} that is a multiple of {SPACE_STRIDE} from "
                    f"{MIN_SIDE} to {MAX_SIDE}, got {value}"
                )
        if self.frames % TIME_STRIDE != 1 or not 1 <= self.frames <= MAX_FRAMES:
            raise ValueError(
                f"--frames: expected 1 + {TIME_STRIDE}k frames (1, 5, 9, ...) up to {MAX_FRAMES}, "
                f"got {self.frames}"
            )

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent."""
        return (
            1 + (self.frames - 1) // TIME_STRIDE,
            self.height // SPACE_STRIDE,
            self.width // SPACE_STRIDE,
        )


@dataclass(frozen=True)
class Stack:
    """All that turns words into pixels."""

    dit: DiT
    vae: VideoVAE
    words: Vocabulary

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device


def load_stack(folder: Path, device: torch.device | str = "cpu") -> Stack:
    """The DiT and the VAE of a checkpoint folder.

    Raises ValueError naming the file that is missing, unreadable or does not fit.
    """
    dit, words = load_dit(folder, device)
    return Stack(dit, load_vae(folder, device=device), words)


@torch.no_grad()
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

    Raises:
        UnknownWords, ValueError: a prompt that the model cannot read, a start that does not fit.
    """
    config = stack.dit.config
    requests = []
    for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        start = None if starts is None else starts[i]
        given = []
        if start is not None:
            frames = start.shape[1]
            fits = frames % TIME_STRIDE == 1 and frames < size.frames
            if not fits or start.shape != (3, frames, size.height, size.width):
                raise ValueError(
                    f"starts: expected [3, 1 + {TIME_STRIDE}k, {size.height}, {size.width}] with "
                    f"fewer than {size.frames} frames, got {list(start.shape)}"
                )
            given = [Given(stack.vae.encode(start[None].to(stack.device))[0], 0.0)]
        words = stack.words.encode(prompt, config.max_words)
        requests.append(Request(words, size.latent, seed + i, given))
    latents = sample(stack.dit, requests, sampling, progress)
    return [stack.vae.decode(latent[None])[0].cpu() for latent in latents]


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
