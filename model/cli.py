"""What all commands share: errors are one line on stderr and exit code 2, Ctrl-C is 130."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Parser(argparse.ArgumentParser):
    """argparse without the usage block: a wrong argument is one line, too."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def positive(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def seed_number(text: str) -> int:
    """An argument that chance is made from; all generators in use take these."""
    if not (text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**31 - 1, got {text!r}")
    return int(text)


def device_of(name: str | None) -> torch.device:
    """The device that `--device` names; by default the GPU if there is one. Raises ValueError."""
    known = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if known else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= known:
        raise ValueError(f"--device: expected one that is here, got {name!r} with {known} GPUs")
    return device


def run(prog: str, main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Calls `main` and turns what it raises into the exit code of the process."""
    try:
        main(None)
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def progress_bar(quiet: bool) -> Progress:
    """A bar with steps and time left on stderr, hidden by `--quiet`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)
