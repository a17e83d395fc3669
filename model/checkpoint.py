"""A checkpoint's folder: the DiT's weights, and what they are in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.config import DiTConfig, from_dict, to_dict
from model.dit import DiT
from model.files import (
    CheckpointError,
    check_finite,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from model.text import Vocabulary, vocabulary_of

CONFIG = "config.json"
DIT = "dit.safetensors"


def update_config(folder: Path, sections: Mapping[str, Any]) -> None:
    """Sets top-level sections of the folder's config.json and keeps the others."""
    path = folder / CONFIG
    current = read_json(path) if path.exists() else {}
    write_json(path, {**current, **sections})


def save_dit(
    folder: Path,
    model: DiT,
    vocabulary: Vocabulary,
    notes: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the weights of a model for use (not for training on) and its part of config.json."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    write_tensors(folder / DIT, weights, {})
    words = list(vocabulary.words) if model.config.text == "words" else []  # others bring theirs
    update_config(folder, {"dit": to_dict(model.config), "vocabulary": words, "training": notes})


def load_dit(folder: Path, device: torch.device | str = "cpu") -> tuple[DiT, Vocabulary]:
    """The model of a checkpoint folder in fp32, in evaluation mode, and its vocabulary.

    Raises CheckpointError when a file is missing, unreadable, or of another shape than its config.
    """
    config = read_json(folder / CONFIG)
    try:
        model = DiT(from_dict(DiTConfig, config["dit"]))
        vocabulary = vocabulary_of(model.config.text, config["vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {folder / CONFIG} describes no DiT: {error}") from error
    weights, _ = read_tensors(folder / DIT)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint: {folder / DIT} does not fit: {reason}") from error
    check_finite(model, folder / DIT)
    return model.to(device).eval(), vocabulary
