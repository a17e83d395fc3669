"""One way to launch a Triton kernel, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Runs ``kernel[grid](*args, **meta)`` with ``device`` current; an empty grid is a no-op."""
    if any(size == 0 for size in grid):
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
