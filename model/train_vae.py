"""Train the video VAE on the procedural world.

    python -m model.train_vae --config tiny --minutes 26 --out runs/vae [--resume]

Stage 1 trains encoder and decoder. Then the encoder is frozen, the latent scale is measured and
``vae_stage1`` is written: latents are final from here on, so a generator can start on them.
Stage 2 trains the decoder alone on those latents and ends with ``vae``. Both are averages (EMA).

Every batch is a pure function of (seed, step), so a resumed run gives the same bits as one that
was never stopped. Ctrl-C writes the state and leaves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.cli import Parser, positive, run, seed_number
from model.config import VAES, WORLDS, VAEConfig, WorldConfig, from_dict, to_dict
from model.files import write_beside, write_json
from model.optim import Muon
from model.vae import VideoVAE, load_vae, save_vae
from model.world import render, sample_scene

STATE = "vae_state.pt"
MAX_SIGNAL = 2.0  # the range of a pixel, for PSNR


@dataclass(frozen=True)
class TrainConfig:
    """What shapes a run. ``steps`` covers both stages; ``stage1`` is the first one's share."""

    steps: int = 8000
    stage1: float = 0.67
    batch: int = 3
    seed: int = 0
    matrix_lr: float = 0.03
    other_lr: float = 2e-3
    warmup: int = 100
    ema: float = 0.998
    latent_noise: float = 0.03  # added in training, so that the decoder forgives the generator
    save_every: int = 500


def batch_of(config: TrainConfig, world: WorldConfig, step: int) -> Tensor:
    """The clips of one step, all of one size: float [B, T, H, W, 3]."""
    rng = np.random.default_rng([config.seed, 7, step])
    first = sample_scene(rng, world)
    size = (first.height, first.width)
    scenes = [first] + [
        sample_scene(rng, world, size=size, frames=first.frames) for _ in range(config.batch - 1)
    ]
    return torch.stack([render(scene) for scene in scenes]).permute(0, 2, 3, 4, 1).contiguous()


def validation(world: WorldConfig, count: int = 32, seed: int = 1) -> list[Tensor]:
    """Clips [3, T, H, W] that are never trained on."""
    return [
        render(sample_scene(np.random.default_rng([seed, 11, number]), world))
        for number in range(count)
    ]


@torch.no_grad()
def psnr(vae: VideoVAE, clips: Iterable[Tensor]) -> float:
    """PSNR in dB of the mean squared error over all pixels of all clips."""
    error, pixels = 0.0, 0
    for clip in clips:
        made = vae.decode(vae.encode(clip[None]), tuple(clip.shape[1:]))[0]  # type: ignore[arg-type]
        error += float((made - clip).double().square().sum())
        pixels += clip.numel()
    return 10 * math.log10(MAX_SIGNAL**2 * pixels / max(error, 1e-12))


def optimisers(config: TrainConfig, module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the rim (first and last layers) and the gains."""
    inner: list[Tensor] = []
    other: list[Tensor] = []
    for name, parameter in module.named_parameters():
        rim = "stem" in name or "head" in name
        (other if parameter.ndim < 2 or rim else inner).append(parameter)
    return [
        Muon(inner, lr=config.matrix_lr),
        torch.optim.AdamW(other, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Run:
    """The whole state of a training run."""

    def __init__(self, config: TrainConfig, model: VAEConfig, world: WorldConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.world = config, world
        self.vae = VideoVAE(model)
        self.average = VideoVAE(model).requires_grad_(False)
        self.average.load_state_dict(self.vae.state_dict())
        self.optimisers = optimisers(config, self.vae)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def boundary(self) -> int:
        """The first step of stage 2."""
        return int(self.config.steps * self.config.stage1)

    def rate(self) -> float:
        """Factor on the learning rates: warm-up and cosine, once per stage."""
        second = self.step >= self.boundary
        begin, end = (self.boundary, self.config.steps) if second else (0, self.boundary)
        done = (self.step - begin) / max(1, end - begin)
        warm = min(1.0, (self.step - begin + 1) / self.config.warmup)
        peak, floor = (0.5, 0.0) if second else (1.0, 0.02)
        return warm * peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def freeze_encoder(self) -> None:
        """Stage 1 -> 2: keep the averaged weights, measure the scale, restart the decoder."""
        self.vae.load_state_dict(self.average.state_dict())
        self._train_decoder_only()
        with torch.no_grad():
            clips = [batch_of(replace(self.config, seed=9), self.world, i) for i in range(48)]
            squares = torch.stack([self.vae.encoder(clip).square().mean() for clip in clips])
        for vae in (self.vae, self.average):
            vae.scale.fill_(float(squares.mean().rsqrt()))

    def _train_decoder_only(self) -> None:
        self.vae.encoder.requires_grad_(False)
        self.optimisers = optimisers(self.config, self.vae.decoder)

    def train_step(self) -> dict[str, float]:
        clips = batch_of(self.config, self.world, self.step)
        noise = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        frozen = self.step >= self.boundary
        with torch.set_grad_enabled(not frozen):
            latent = self.vae.encoder(clips)
        spread = self.config.latent_noise * latent.detach().std()
        made = self.vae.decoder(latent + spread * torch.randn(latent.shape, generator=noise))
        error = made - clips
        mse, l1 = error.square().mean(), error.abs().mean()
        loss = mse + 0.15 * l1
        if not frozen:
            loss = loss + 1e-3 * (latent.square().mean() - 1).square()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        factor = self.rate()
        for optimiser, lr in zip(
            self.optimisers, (self.config.matrix_lr, self.config.other_lr), strict=True
        ):
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.step()
        self._average()
        self.step += 1
        return {"mse": float(mse.detach()), "l1": float(l1.detach())}

    @torch.no_grad()
    def _average(self) -> None:
        since = self.step - (self.boundary if self.step >= self.boundary else 0)
        decay = min(self.config.ema, (since + 1) / (since + 10))
        mean: list[Tensor] = list(self.average.parameters())
        now: list[Tensor] = list(self.vae.parameters())
        torch._foreach_lerp_(mean, now, 1 - decay)

    def save(self, path: Path) -> None:
        """Everything a resumed run needs, beside then renamed."""
        state = {
            "config": asdict(self.config), "model": to_dict(self.vae.config),
            "world": to_dict(self.world), "step": self.step,
            "vae": self.vae.state_dict(), "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "curve": self.curve, "seconds": self.seconds,
        }  # fmt: skip
        part = Path(f"{path}.part")
        try:
            torch.save(state, part)
            os.replace(part, path)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(f"{path}: cannot be written ({error})") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Run:
        """The run that :meth:`save` wrote, to the same bits."""
        try:
            state = torch.load(path, weights_only=True)
            run = cls(
                TrainConfig(**state["config"]),
                from_dict(VAEConfig, state["model"]),
                from_dict(WorldConfig, state["world"]),
            )
            run.step = state["step"]
            if run.step >= run.boundary:
                run._train_decoder_only()
            run.vae.load_state_dict(state["vae"])
            run.average.load_state_dict(state["average"])
            for optimiser, saved in zip(run.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            run.curve, run.seconds = state["curve"], state["seconds"]
        except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not a state of this trainer ({error})") from error
        return run

    def finished(self) -> VideoVAE:
        """The averaged model with its scale in its config."""
        vae = VideoVAE(replace(self.average.config, scale=float(self.average.scale)))
        vae.load_state_dict(self.average.state_dict())
        return vae.eval().requires_grad_(False)


def write_curve(run: Run, folder: Path, command: str) -> None:
    """vae_loss.json and vae_loss.png."""
    write_json(
        folder / "vae_loss.json",
        {"command": command, "config": asdict(run.config), "seconds": round(run.seconds, 1),
         "stage1_steps": run.boundary, "curve": run.curve},
    )  # fmt: skip
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.add_subplot()
    steps = [point["step"] for point in run.curve]
    decibels = [10 * math.log10(MAX_SIGNAL**2 / point["mse"]) for point in run.curve]
    axis.plot(steps, decibels, lw=1, label="train")
    checked = [point for point in run.curve if "psnr" in point]
    axis.plot(
        [point["step"] for point in checked], [point["psnr"] for point in checked], "o-", ms=3,
        label="validation, averaged weights",
    )  # fmt: skip
    axis.axvline(run.boundary, color="gray", ls=":", label="encoder frozen")
    axis.set(xlabel="step", ylabel="PSNR, dB", title="Video VAE, tiny")
    axis.legend()
    canvas = FigureCanvasAgg(figure)
    write_beside(folder / "vae_loss.png", lambda beside: canvas.print_png(beside))


@contextmanager
def progress(quiet: bool, total: int, start: int) -> Iterator[Any]:
    """Yields update(step, text)."""
    if quiet:
        yield lambda step, text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("VAE"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[text]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("vae", total=total, completed=start, text="")
        yield lambda step, text: bar.update(task, completed=step, text=text)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields asked(): Ctrl-C only sets it, so that a step is never cut in half."""
    asked = False

    def remember(*_: object) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(run: Run, folder: Path, command: str, quiet: bool = False) -> None:
    """Train to the end, writing the state and the checkpoints; Ctrl-C saves, then raises."""
    clips = validation(run.world)
    window: list[dict[str, float]] = []
    with progress(quiet, run.config.steps, run.step) as update, interruptible() as asked:
        while run.step < run.config.steps and not asked():
            began = time.monotonic()
            window.append(run.train_step())
            run.seconds += time.monotonic() - began
            if run.step % 50 == 0:
                mean = {key: sum(item[key] for item in window) / len(window) for key in window[0]}
                window.clear()
                run.curve.append({"step": run.step, "seconds": round(run.seconds, 1), **mean})
                update(run.step, f"train {10 * math.log10(MAX_SIGNAL**2 / mean['mse']):.2f} dB")
            if run.step == run.boundary:
                run.freeze_encoder()
                _report("stage 1 done, encoder frozen", run, folder, "vae_stage1", clips)
            if run.step % run.config.save_every == 0 or run.step == run.boundary:
                if run.curve:
                    run.curve[-1]["psnr"] = round(psnr(run.average, clips), 3)
                    print(json.dumps(run.curve[-1]), flush=True)
                run.save(folder / STATE)
    run.save(folder / STATE)
    if run.step < run.config.steps:
        raise KeyboardInterrupt
    final = _report("done", run, folder, "vae", clips)
    if run.curve:
        run.curve[-1]["psnr"] = round(final, 3)
    write_curve(run, folder, command)


def _report(what: str, run: Run, folder: Path, name: str, clips: list[Tensor]) -> float:
    """Write a checkpoint, read it back, and print its PSNR."""
    path = save_vae(run.finished(), folder, name)
    quality = psnr(load_vae(folder, name), clips)
    print(f"{what} after {run.seconds / 60:.1f} min: {quality:.2f} dB, {path}", flush=True)
    return quality


def steps_for(minutes: float, run: Run, probe: int = 40) -> int:
    """How many steps fit, measured on the first ones of a throw-away copy of the run."""
    for _ in range(5):
        run.train_step()
    began = time.monotonic()
    for _ in range(probe):
        run.train_step()
    full = (time.monotonic() - began) / probe
    # Stage 2 skips the encoder's backward: measured about 0.62 of a full step.
    share = run.config.stage1
    return max(100, int(minutes * 60 / (full * (share + 0.62 * (1 - share)))))


def new(options: argparse.Namespace) -> Run:
    """A new run."""
    state = options.out / STATE
    if state.exists():
        raise ValueError(
            f"--out: {options.out} holds a run already; pass --resume or another --out"
        )
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes: expected a positive number, got {options.minutes}")
    model, world = VAES[options.config or "tiny"], WORLDS[options.world or "vae"]
    config = TrainConfig(seed=options.seed or 0)
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    elif options.minutes is not None:
        config = replace(config, steps=steps_for(options.minutes, Run(config, model, world)))
    if config.steps < 2:
        raise ValueError(f"--steps: expected at least 2, got {config.steps}")
    return Run(config, model, world)


def resumed(options: argparse.Namespace) -> Run:
    """The run in `options.out`, which goes on as it began."""
    state = options.out / STATE
    if not state.is_file():
        raise ValueError(f"--resume: {state} does not exist")
    run = Run.load(state)
    differs = [
        name
        for name, given, own in (
            ("--config", options.config and VAES[options.config], run.vae.config),
            ("--world", options.world and WORLDS[options.world], run.world),
            ("--steps", options.steps, run.config.steps),
            ("--seed", options.seed, run.config.seed),
            ("--minutes", options.minutes, None),
        )
        if given is not None and given != own
    ]
    if differs:
        raise ValueError(f"--resume: expected the run as it began, got other {', '.join(differs)}")
    return run


def make_parser() -> Parser:
    parser = Parser(prog="python -m model.train_vae", description=__doc__)
    parser.add_argument("--config", choices=sorted(VAES), help="tiny")
    parser.add_argument("--world", choices=sorted(WORLDS), help="vae")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive)
    length.add_argument("--minutes", type=float, help="choose the steps that take this long")
    parser.add_argument("--seed", type=seed_number, help="0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    begun = resumed(options) if options.resume else new(options)
    options.out.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if argv is None else argv
    try:
        train(begun, options.out, " ".join(["python -m model.train_vae", *words]), options.quiet)
    except KeyboardInterrupt:
        print(f"stopped; continue with --resume --out {options.out}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    run("python -m model.train_vae", main)
