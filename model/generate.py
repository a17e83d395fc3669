"""A prompt becomes a video: `python -m model.generate "a red circle moving left" -o out.mp4`.

Every mode is an option; `docs/modes.md` shows each of them as a list of parts. The file says how it
was made (`model.provenance`).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import modes
from model.cli import Parser, device_of, positive, progress_bar, run, seed_number
from model.expand import ASPECTS, expand
from model.files import cannot_write
from model.modes import Job
from model.provenance import ProvenanceError, sign
from model.sample import Sampling
from model.stack import CHECKPOINT, Size, Stack, load_stack
from model.video import (
    contact_sheet,
    from_uint8,
    read_image,
    read_video,
    to_uint8,
    write_clips,
    write_image,
)

FPS = 8.0
DEFAULTS = {"frames": 9, "direction": "forward", "times": 1, "strength": 0.6, "factor": 4}
SIDES = (32, 32)  # width and height of what is made from words
LOOP_FRAMES = 16
PACK = 16  # windows of super-resolution that are made in one pack
CONTEXTS = (modes.CONTEXT, 5)  # known frames next to new ones: the most that the clip has
MODES = ("image", "extend", "connect", "fill", "super_resolve", "edit", "loop")
BELONGS = {"direction": "extend", "times": "extend", "strength": "edit", "factor": "super_resolve",
           "frames_mask": "fill"}  # fmt: skip
# What known frames show, so that an expanded prompt must not draw it; clips show everything. A loop
# turns back: its prompts say no direction.
SHOWN = {"text": (), "image": ("colour", "size", "background"), "loop": ("direction", "speed")}

Progress = Callable[[int], None]


# --- from options to jobs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a command line asks for.

    Attributes:
        make: yields the clips that make up the video, each when it is made.
        walks: how many packs are sampled.
        fps: frames per second.
        backward: the first clip comes last.
    """

    make: Callable[[Stack, Sampling, Progress], Iterator[Tensor]]
    walks: int = 1
    fps: float = FPS
    backward: bool = False


def pasted(
    stack: Stack, jobs: Sequence[Job], paste: bool, sampling: Sampling, progress: Progress
) -> list[Tensor]:
    """The clips of all jobs, made in one pack, with known frames put back if `paste`."""
    clips = modes.run(stack, jobs, sampling, progress)
    if not paste:
        return clips
    return [modes.paste(job, clip) for job, clip in zip(jobs, clips, strict=True)]


def one_job(
    job: Job, paste: bool, fps: float = FPS, finish: Callable[[Tensor], Tensor] = lambda clip: clip
) -> Plan:
    """The job in one walk; `finish` makes the video of its clip."""

    def make(stack: Stack, sampling: Sampling, progress: Progress) -> Iterator[Tensor]:
        (clip,) = pasted(stack, [job], paste, sampling, progress)
        yield finish(clip)

    return Plan(make, 1, fps)


def plan(args: argparse.Namespace) -> Plan:
    """The plan of a command line whose options are consistent. Raises ValueError for clips and
    numbers that do not fit."""
    return PLANS[mode_of(args)](args)


def mode_of(args: argparse.Namespace) -> str:
    """The mode that the options choose."""
    return next((name for name in MODES if getattr(args, name)), "text")


def of_text(args: argparse.Namespace) -> Plan:
    size = size_of(args, None)
    return one_job(modes.text_to_video(args.prompt, size, args.seed), args.paste)


def of_loop(args: argparse.Namespace) -> Plan:
    size = size_of(args, None)
    return one_job(modes.loop(args.prompt, size, args.seed), args.paste)


def of_image(args: argparse.Namespace) -> Plan:
    image = read_image(args.image)
    job = modes.image_to_video(args.prompt, size_of(args, image), image, args.seed)
    return one_job(job, args.paste)


def of_edit(args: argparse.Namespace) -> Plan:
    clip, fps = read_video(args.edit)
    size_of(args, clip)
    job = modes.edit(args.prompt, clip, args.strength, args.seed)
    return one_job(job, args.paste, fps)


def of_fill(args: argparse.Namespace) -> Plan:
    clip, fps = read_video(args.fill)
    size_of(args, clip)
    if args.frames_mask is None:
        raise ValueError("--frames-mask: expected START:STOP, the frames that --fill makes anew")
    start, stop = args.frames_mask
    if not 0 <= start < stop <= clip.shape[1] or stop - start == clip.shape[1]:
        raise ValueError(
            f"--frames-mask: expected a part of the clip's {clip.shape[1]} frames, "
            f"got {start}:{stop}"
        )
    job, first = modes.fill_gap(args.prompt, clip, start, stop, args.seed)

    def put_back(made: Tensor) -> Tensor:
        last = first + job.size.frames
        return torch.cat([clip[:, :first], made, clip[:, last:]], 1)

    return one_job(job, args.paste, fps, put_back)


def of_super_resolve(args: argparse.Namespace) -> Plan:
    clip, fps = read_video(args.super_resolve)
    size_of(args, clip)
    if clip.shape[1] < 2:
        raise ValueError("--super-resolve: expected a clip of at least 2 frames, got 1")
    jobs = modes.in_windows(args.prompt, clip, args.factor, args.seed)
    packs = [jobs[first : first + PACK] for first in range(0, len(jobs), PACK)]

    def make(stack: Stack, sampling: Sampling, progress: Progress) -> Iterator[Tensor]:
        for pack in packs:
            for job, made in zip(
                pack, pasted(stack, pack, args.paste, sampling, progress), strict=True
            ):
                yield made if job is jobs[-1] else made[:, :-1]  # the next one begins with it

    return Plan(make, len(packs), fps * args.factor)


def of_connect(args: argparse.Namespace) -> Plan:
    (before, fps), (after, _) = (read_video(path) for path in args.connect)
    size = size_of(args, before)
    if after.shape[2:] != before.shape[2:]:
        raise ValueError(
            f"--connect: expected clips of one size, got {pixels(before)} and {pixels(after)}"
        )
    context = min(context_of(clip, "--connect") for clip in (before, after))
    job = modes.connect(args.prompt, size, before, after, context, args.seed)
    return one_job(job, args.paste, fps, lambda made: torch.cat([before, made, after], 1))


def of_extend(args: argparse.Namespace) -> Plan:
    clip, fps = read_video(args.extend)
    size, context = size_of(args, clip), context_of(clip, "--extend")

    def make(stack: Stack, sampling: Sampling, progress: Progress) -> Iterator[Tensor]:
        yield clip
        yield from modes.chain(
            stack, args.prompt, size, args.times, clip, direction=args.direction, context=context,
            seed=args.seed, sampling=sampling, progress=progress,
        )  # fmt: skip

    return Plan(make, args.times, fps, args.direction == "backward")


PLANS: dict[str, Callable[[argparse.Namespace], Plan]] = {
    "text": of_text, "image": of_image, "extend": of_extend, "connect": of_connect, "fill": of_fill,
    "super_resolve": of_super_resolve, "edit": of_edit, "loop": of_loop,
}  # fmt: skip


def pixels(clip: Tensor) -> str:
    """WIDTHxHEIGHT of a clip."""
    return f"{clip.shape[3]}x{clip.shape[2]}"


def expanded(args: argparse.Namespace) -> str:
    """The prompt with details that fit the clip and contradict nothing that is given."""
    width, height = args.size or SIDES
    leave = SHOWN.get(mode_of(args), ASPECTS)
    return expand(args.prompt, args.seed, frames=args.frames, size=(height, width), leave=leave)


def size_of(args: argparse.Namespace, clip: Tensor | None) -> Size:
    """Of the clip to make: that of the clip that is read, if there is one."""
    width, height = args.size or SIDES
    if clip is not None:
        if args.size is not None and pixels(clip) != f"{width}x{height}":
            raise ValueError(f"--size: follows the input, {pixels(clip)}, got {width}x{height}")
        height, width = clip.shape[2:]
    return Size(width, height, args.frames)


def context_of(clip: Tensor, option: str) -> int:
    """How many known frames of the clip are shown."""
    for context in CONTEXTS:
        if clip.shape[1] >= context:
            return context
    raise ValueError(
        f"{option}: expected a clip of at least {CONTEXTS[-1]} frames, got {clip.shape[1]}"
    )


# --- command -------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """WxH."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 48x32, got {text!r}")
    return int(width), int(height)


def parse_range(text: str) -> tuple[int, int]:
    """START:STOP."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected START:STOP, such as 4:12, got {text!r}")
    return int(start), int(stop)


def make_parser() -> Parser:
    parser = Parser(prog="python -m model.generate", description="Make a video from a prompt.")
    parser.add_argument("prompt", help='such as "a red circle moving left"')
    parser.add_argument("--expand", action="store_true",
                        help="print the prompt with details and use it")  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="a .mp4, or a .png for images"
    )
    parser.add_argument("--size", type=parse_size, help="WIDTHxHEIGHT (32x32, or the input's)")
    parser.add_argument("--frames", type=positive, help="to make (9; loop: 16); 1 is an image")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--steps", type=positive, default=Sampling.steps, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance, help="1 = none")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--image", type=Path, help="picture: the first frame")
    mode.add_argument("--extend", type=Path, help="clip to go on from, see --direction, --times")
    mode.add_argument("--connect", type=Path, nargs=2, metavar=("A", "B"), help="clips to join")
    mode.add_argument("--fill", type=Path, help="clip of which --frames-mask is made anew")
    mode.add_argument("--super-resolve", type=Path, help="clip to get --factor times the frames")
    mode.add_argument("--edit", type=Path, help="clip to change, by as much as --strength")
    mode.add_argument("--loop", action="store_true", help="the last frame is followed by the first")
    parser.add_argument("--direction", choices=("forward", "backward"), help="forward")
    parser.add_argument("--times", type=positive, help="how often to extend (1)")
    parser.add_argument(
        "--frames-mask", type=parse_range, metavar="START:STOP", help="4:12 = 4..11"
    )
    parser.add_argument("--factor", type=positive, help="new frames per known frame (4)")
    parser.add_argument("--strength", type=float, help="in (0, 1]; 1 forgets the clip (0.6)")
    parser.add_argument("--no-paste", dest="paste", action="store_false",
                        help="show known frames as they were made, too")  # fmt: skip
    parser.add_argument("--frames-png", type=Path, help="also write all frames side by side")
    parser.add_argument("--zoom", type=positive, default=1, help="pixels per pixel in the output")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def check(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with defaults filled in. Raises ValueError for options that contradict."""
    suffix = args.out.suffix.lower()
    if suffix not in (".mp4", ".png"):
        raise ValueError(f"--out: expected a name that ends in .mp4 or .png, got {args.out}")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance: expected a finite number, got {args.guidance}")
    for name, mode in BELONGS.items():
        if getattr(args, name) is not None and not getattr(args, mode):
            option, wanted = (f"--{text.replace('_', '-')}" for text in (name, mode))
            raise ValueError(f"{option}: expected only with {wanted}")
    if args.frames is not None and (args.fill or args.super_resolve or args.edit):
        raise ValueError(f"--frames: follows the clip in this mode, got {args.frames}")
    if suffix == ".png" and args.frames != 1:
        raise ValueError(f"--out: a .png holds one frame, got --frames {args.frames or 'default'}")
    if args.image is not None and args.frames == 1:
        raise ValueError("--image: expected --frames 2 or more to continue it, got 1")
    if args.loop and args.frames is None:
        args.frames = LOOP_FRAMES
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(f"--strength: expected a number in (0, 1], got {args.strength}")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What is signed into the file: how it was made."""
    return {
        "prompt": args.prompt,
        "mode": mode_of(args),
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "checkpoint": args.checkpoint.name,
    }


def last_first(clips: Iterable[Tensor], folder: Path) -> Iterator[Tensor]:
    """The clips in the opposite order; they wait in files in `folder`, not in memory."""
    count = 0
    for clip in clips:
        np.save(folder / f"{count}.npy", to_uint8(clip))
        count += 1
    for number in reversed(range(count)):
        yield from_uint8(np.load(folder / f"{number}.npy"))
        (folder / f"{number}.npy").unlink()


def save(
    path: Path,
    clips: Iterator[Tensor],
    fps: float,
    zoom: int,
    about: Mapping[str, Any],
    backward: bool = False,
) -> None:
    """Writes the clips, each as soon as it is made, with content credentials: whole or not at all.

    A .png shows the first frame. Raises ValueError naming `path` if the system refuses to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            beside = Path(folder) / path.name
            if path.suffix.lower() == ".png":
                write_image(beside, next(clips), zoom)
            else:
                if backward:
                    clips = last_first(clips, Path(folder))
                write_clips(beside, clips, fps, zoom)
            sign(beside, about)
            os.replace(beside, path)
    except ProvenanceError:
        raise
    except (OSError, ValueError) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(refused, OSError):
            raise
        raise ValueError(f"--out: {cannot_write(path, refused)}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = check(make_parser().parse_args(argv))
    if args.expand:
        args.prompt = expanded(args)
        print(args.prompt)
    wanted = plan(args)
    stack = load_stack(args.checkpoint, device_of(args.device))
    stack.words.encode(args.prompt, stack.dit.config.max_words)
    shown: list[Tensor] = []  # all frames, for the one picture that needs them

    def watched(clips: Iterable[Tensor]) -> Iterator[Tensor]:
        for clip in clips:
            if args.frames_png is not None:
                shown.append(clip)
            yield clip

    with progress_bar(args.quiet) as bar:
        task = bar.add_task("sampling", total=args.steps * wanted.walks)
        sampling = Sampling(args.steps, args.guidance)
        clips = watched(wanted.make(stack, sampling, lambda _: bar.advance(task)))
        save(args.out, clips, wanted.fps, args.zoom, about(args), wanted.backward)
    if args.frames_png is not None:
        row = torch.cat(shown[::-1] if wanted.backward else shown, 1)
        contact_sheet(args.frames_png, [row], scale=6)
    print(args.out)


if __name__ == "__main__":
    run("python -m model.generate", main)
