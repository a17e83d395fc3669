"""Trains a DiT on packed clips of every size: `python -m model.train --config tiny`.

Every step is a pure function of (weights, optimiser, seed, step number): no random state is kept,
so a run that is stopped and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.budget import training_flops
from model.checkpoint import (
    DIT,
    CheckpointError,
    load_dit,
    read_tensors,
    save_dit,
    write_json,
    write_tensors,
)
from model.cli import Parser, positive, progress_bar, run, seed_number
from model.config import DITS, MODES, TRAININGS, WORLDS, TrainConfig, to_dict
from model.data import (
    Batch,
    LatentCache,
    Packs,
    PackSource,
    build_cache,
    cache_key,
    load_cache,
    make_batch,
    save_cache,
)
from model.dit import DiT
from model.optim import Muon
from model.speed import measure
from model.text import Vocabulary, vocabulary_of
from model.training_log import Log, plot_log, speed_of
from model.vae import VideoVAE, load_vae, save_vae
from model.world import VOCABULARY

Velocity = Callable[[DiT, Batch], list[Tensor]]

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny"
STATE = "train_state.safetensors"
LOG = "dit_loss.json"
PLOT = "dit_loss.png"
LOG_EVERY = 25
SAVE_EVERY = 250


def schedule(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimisers(model: DiT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or, with `config.muon`, Muon for the matrices inside the blocks."""
    inner = {id(p) for p in model.blocks.parameters() if config.muon and p.dim() == 2}
    rest = [p for p in model.parameters() if id(p) not in inner]
    decayed = [p for p in rest if p.dim() > 1]
    others = [p for p in rest if p.dim() <= 1]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay},
             {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate, betas=config.betas, fused=True,
        )
    ]  # fmt: skip
    if inner:
        matrices = [p for p in model.parameters() if id(p) in inner]
        optimisers.append(Muon(matrices, lr=config.muon))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def packed_velocity(model: DiT, batch: Batch) -> list[Tensor]:
    """The model's velocity of every grid part, all clips in one pack."""
    return model(batch.inputs, batch.layout, batch.words, batch.times)


def batch_loss(
    model: DiT, batch: Batch, velocity: Velocity = packed_velocity
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity over all latent values to be made, and per clip [S]."""
    predicted = velocity(model, batch)
    clips = batch.layout.num_segments
    errors: list[Tensor] = []
    owners: list[int] = []
    sizes = torch.zeros(clips)
    for v, wanted, owner in zip(predicted, batch.wanted, batch.owners, strict=True):
        if wanted is not None:
            errors.append((v - wanted).square().sum())
            owners.append(owner)
            sizes[owner] += wanted.numel()
    total = torch.stack(errors)
    per_clip = torch.zeros(clips).index_add(0, torch.tensor(owners), total.detach())
    return total.sum() / sizes.sum(), per_clip / sizes


class Trainer:
    """Model, its moving average and the optimiser, advanced one pack at a time.

    Args:
        packs: pack `i` as numbers of clips, a pure function of i (default: `Packs`).
        velocity: how a batch goes through the model (default: packed).
    """

    def __init__(
        self,
        model: DiT,
        config: TrainConfig,
        cache: LatentCache,
        *,
        packs: PackSource | None = None,
        velocity: Velocity = packed_velocity,
    ) -> None:
        self.model, self.config, self.cache, self.velocity = model, config, cache, velocity
        self.step = 0
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters: list[Tensor] = [tensor for _, tensor in model.named_parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimisers = make_optimisers(model, config)
        self.packs = packs or Packs(
            cache.tokens(model.config.patch), config.tokens, model.config.width, config.seed
        )

    def advance(self) -> tuple[Tensor, Tensor, Batch]:
        """One step: loss before it, loss per clip, and the batch."""
        config = self.config
        batch = make_batch(self.cache, self.packs[self.step], self.model.config, config, self.step)
        loss, per_clip = batch_loss(self.model, batch, self.velocity)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(config, self.step)
            optimiser.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return loss.detach(), per_clip, batch

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What the parameter's optimiser remembers of it; changes to the dict are changes there."""
        for optimiser in self.optimisers:
            if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                return optimiser.state[parameter]
        raise KeyError("parameter without an optimiser")

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"model.{name}"] = parameter
            tensors[f"average.{name}"] = average
            for key, value in self._moments(parameter).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continues from what `state` gave after `step` steps."""
        try:
            for name, parameter, average in zip(
                self.names, self.parameters, self.average, strict=True
            ):
                with torch.no_grad():
                    parameter.copy_(tensors[f"model.{name}"])
                average.copy_(tensors[f"average.{name}"])
                moments = self._moments(parameter)
                moments.update({
                    key: tensors[f"{key}.{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq", "momentum")
                    if f"{key}.{name}" in tensors
                })  # fmt: skip
                if step and not moments:
                    raise KeyError(f"no moments of {name}")
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"state: does not fit this model: {error}") from error
        self.step = step

    def averaged(self) -> DiT:
        """A copy of the model with the averaged weights."""
        model = DiT(self.model.config)
        weights = zip(self.names, self.average, strict=True)
        model.load_state_dict(dict(weights))
        return model.eval()


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM only raise a flag, so that a step is finished and saved."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def save(trainer: Trainer, log: Log, out: Path, vocabulary: Vocabulary, command: str) -> None:
    """Writes the state to resume from, then the averaged model and the loss curve."""
    notes = {"config": to_dict(trainer.config), "step": trainer.step, "log": log.rows,
             "seconds": log.seconds}  # fmt: skip
    write_tensors(out / STATE, trainer.state(), notes)
    about = {"command": command, "train": notes["config"], "step": trainer.step}
    about["minutes"] = round(log.seconds / 60, 1)
    save_dit(out, trainer.averaged(), vocabulary, about)
    write_json(out / LOG, {"command": command, "config": notes["config"], "rows": log.rows})
    if log.rows:
        plot_log(log.rows, out / PLOT)


def restore(trainer: Trainer, path: Path) -> Log:
    """Puts `trainer` where the state in `path` was saved."""
    tensors, notes = read_tensors(path)
    missing = sorted({"config", "step", "log", "seconds"} - notes.keys())
    if missing:
        raise CheckpointError(f"resume: {path} is no state of a training, {missing} are missing")
    ours, theirs = to_dict(trainer.config), notes["config"]
    changed = sorted(name for name in ours if ours[name] != theirs.get(name))
    if changed:
        listed = ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in changed)
        raise CheckpointError(f"resume: {path} was trained with another config: {listed}")
    trainer.restore(tensors, notes["step"])
    return Log(notes["log"], notes["seconds"])


def train(
    trainer: Trainer,
    out: Path,
    vocabulary: Vocabulary,
    *,
    log: Log | None = None,
    minutes: float | None = None,
    quiet: bool = False,
    command: str = "",
) -> bool:
    """Trains to the last step, or until Ctrl-C or the minutes are over; True if it came to the end.

    Saves every SAVE_EVERY steps and at the end, so `--resume` continues from wherever it stopped.
    """
    log = Log() if log is None else log
    total, started = trainer.config.steps, time.monotonic()
    bar = progress_bar(quiet)
    plain = not quiet and not bar.console.is_terminal
    with stop_flag() as stopped, bar:
        task = bar.add_task("training", total=total, completed=trainer.step)
        saved = -1
        while trainer.step < total and not stopped():
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            begin = time.monotonic()
            loss, per_clip, batch = trainer.advance()
            value = float(loss)  # waits for the device
            seconds = time.monotonic() - begin
            flops = training_flops(trainer.model.config, batch.layout.segments)
            log.add(value, per_clip, batch, seconds, flops)
            if not math.isfinite(value):
                raise CheckpointError(f"loss: became {value} at step {trainer.step}")
            if trainer.step % LOG_EVERY == 0 or trainer.step == total:
                row = log.close_row(trainer.step)
                text = f"loss {row['loss']:.4f}  {speed_of(row)}"
                bar.update(task, description=text)
                if plain and trainer.step % (4 * LOG_EVERY) == 0:
                    print(f"step {trainer.step}/{total}  {text}", flush=True)
            bar.update(task, completed=trainer.step)
            if trainer.step % SAVE_EVERY == 0:
                save(trainer, log, out, vocabulary, command)
                saved = trainer.step
        if saved != trainer.step:
            save(trainer, log, out, vocabulary, command)
    return trainer.step >= total


def prepare(config: TrainConfig, vae: VideoVAE, path: Path, quiet: bool) -> LatentCache:
    """The latent cache in `path`, made first if it is absent or was made from other things."""
    digest = hashlib.sha256()
    for _, tensor in sorted(vae.encoder.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    digest.update(vae.scale.numpy().tobytes())
    vocabulary = vocabulary_of(DITS[config.dit].text, VOCABULARY)
    world, modes = WORLDS[config.world], MODES[config.modes]
    fingerprint = digest.hexdigest()[:16]
    key = cache_key(world, modes, config.clips, config.seed, vocabulary, fingerprint)
    cache = load_cache(path, key)
    if cache is None:
        limit = DITS[config.dit].max_words
        with progress_bar(quiet) as bar, torch.no_grad():
            task = bar.add_task("encoding clips", total=config.clips)
            cache = build_cache(
                vae.encode, world, modes, config.clips, config.seed, vocabulary, limit,
                lambda done: bar.update(task, completed=done),
            )  # fmt: skip
        save_cache(path, cache, key)
    return cache


def start_from(model: DiT, vocabulary: Vocabulary, folder: Path) -> None:
    """Copies the weights of the model in `folder`, which must have the same config and words."""
    other, words = load_dit(folder)
    if other.config != model.config or words.words != vocabulary.words:
        raise ValueError(f"--init: expected a model of config {model.config}, got {other.config}")
    model.load_state_dict(other.state_dict())


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.train", description="Train a DiT on the world.")
    parser.add_argument("--config", required=True, help=f"one of {', '.join(TRAININGS)}")
    parser.add_argument("--steps", type=positive, help="length of the run (default: the config's)")
    parser.add_argument("--minutes", type=float, help="stop (resumable) after so many minutes")
    parser.add_argument("--clips", type=positive, help="clips in the latent cache")
    parser.add_argument("--seed", type=seed_number, help="of everything random in the training")
    parser.add_argument("--out", type=Path, help="default: runs/CONFIG")
    parser.add_argument("--vae", type=Path, default=CHECKPOINT, help="folder of the VAE checkpoint")
    parser.add_argument("--cache", type=Path, help="latents (default: OUT/latents.safetensors)")
    parser.add_argument("--init", type=Path, help="start from the model in this folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.config not in TRAININGS:
        raise ValueError(f"--config: expected one of {', '.join(TRAININGS)}, got {args.config!r}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes: expected a positive number, got {args.minutes}")
    chosen = {name: getattr(args, name) for name in ("steps", "clips", "seed")}
    config = replace(TRAININGS[args.config], **{k: v for k, v in chosen.items() if v is not None})
    out = args.out or Path("runs") / args.config
    state = out / STATE
    if state.exists() and not args.resume:
        raise ValueError(f"--out: {out} holds a run already; pass --resume or another --out")
    if args.resume and not state.exists():
        raise ValueError(f"--resume: found no {state}")
    vocabulary = vocabulary_of(DITS[config.dit].text, VOCABULARY)
    vae = load_vae(args.vae)
    cache = prepare(config, vae, args.cache or out / "latents.safetensors", args.quiet)
    save_vae(vae, out)  # the folder is then complete for `model.generate`
    torch.manual_seed(config.seed)
    model = DiT(replace(DITS[config.dit], vocabulary=len(vocabulary)))
    if args.init is not None:
        start_from(model, vocabulary, args.init)
    trainer = Trainer(model, config, cache)
    log = restore(trainer, state) if args.resume else Log()
    log.machine = measure(trainer.parameters[0].device)
    command = "python -m model.train " + " ".join(
        f"--{name} {value}"
        for name, value in (("config", args.config), *chosen.items(), ("init", args.init))
        if value is not None
    )
    done = train(trainer, out, vocabulary, log=log, minutes=args.minutes, quiet=args.quiet,
                 command=command)  # fmt: skip
    if not done:
        print(f"stopped after step {trainer.step} of {config.steps}; continue with --resume",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(130 if args.minutes is None else 0)
    print(f"{out / DIT}: step {trainer.step}, loss {log.rows[-1]['loss'] if log.rows else 'n/a'}")


if __name__ == "__main__":
    run("python -m model.train", main)
