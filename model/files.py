"""Files that are whole or absent: written beside their place, flushed, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, does not fit, or could not be written."""


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary name beside `path`, then renames it to `path`.

    Whatever fails, `path` keeps its old content and the temporary file is removed. A full disk and
    other refusals of the system become a `CheckpointError` that says so.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(cannot_write(path, error)) from error
    finally:
        beside.unlink(missing_ok=True)


def cannot_write(path: Path, error: BaseException) -> str:
    """What to say when `error` kept `path` from being written."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    kept = "; the file that was there is kept" if path.exists() else ""
    return f"cannot write {path}: {reason}{kept}"


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_beside(path, lambda beside: _write_text(beside, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all; `metadata` values are stored as JSON."""
    flat = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    notes = {name: json.dumps(value) for name, value in metadata.items()}
    write_beside(path, lambda beside: save_file(flat, beside, notes))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of `write_tensors`."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file {path}, found none")
    try:
        with safe_open(path, "pt") as file:
            notes = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, notes
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint: {path} is unreadable: {error}") from error


def check_finite(module: nn.Module, path: Path) -> None:
    """Raises CheckpointError if `module`, read from `path`, holds a weight that is no number."""
    for name, tensor in module.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint: {path} holds values of {name} that are not finite")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: expected a file {path}, found none") from None
    except (OSError, ValueError) as error:  # no JSON, or no text at all
        raise CheckpointError(f"checkpoint: {path} is unreadable: {error}") from error
