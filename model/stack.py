"""All that turns words into pixels, the sizes it can make, and its way between pixels and latents.

Sizes that the VAE cannot hold are padded: width and height up to a multiple of 8 on the right and
at the bottom, frames up to 1 + 4k at the end, known pixels by repeating their last column, row or
frame. What is made is cropped back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import load_dit
from model.dit import DiT
from model.text import Vocabulary
from model.tiling import decode_tiled, encode_tiled
from model.vae import SPACE_STRIDE, TIME_STRIDE, VideoVAE, latent_shape, load_vae

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny"
MIN_SIDE, MAX_SIDE, MAX_FRAMES = 16, 2048, 1 + 4 * 256
BATCH_PIXELS = 1 << 20
TILED_PIXELS = 1 << 22  # larger clips go through the VAE in tiles, with the same result
VOLUME = TIME_STRIDE * SPACE_STRIDE**2  # pixels of a place in the latent


@dataclass(frozen=True)
class Size:
    """Pixels and frames of a clip."""

    width: int
    height: int
    frames: int

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not MIN_SIDE <= value <= MAX_SIDE:
                raise ValueError(
                    f"size: expected a {name} from {MIN_SIDE} to {MAX_SIDE}, got {value}"
                )
        if not 1 <= self.frames <= MAX_FRAMES:
            raise ValueError(f"frames: expected 1 to {MAX_FRAMES}, got {self.frames}")

    @classmethod
    def of(cls, video: Tensor) -> Size:
        """The size of a video [3, T, H, W]."""
        _, frames, height, width = video.shape
        return cls(width, height, frames)

    @property
    def latent(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent, which covers the padded clip."""
        return latent_shape(self.frames, self.height, self.width)

    @property
    def padded_frames(self) -> int:
        """Frames that the latent covers."""
        return 1 + TIME_STRIDE * (self.latent[0] - 1)


@dataclass(frozen=True)
class Stack:
    """The models and the words they know."""

    dit: DiT
    vae: VideoVAE
    words: Vocabulary

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    @torch.no_grad()
    def encode(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Videos [3, T, H, W] of any sizes -> latents [C, t, h, w], each encoded on its own."""
        return _by_shape(videos, lambda batch: self._encode(batch.to(self.device)), 1)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Latents [C, t, h, w] -> videos [3, 1 + 4 (t - 1), 8 h, 8 w] on the CPU."""
        return _by_shape(latents, lambda batch: self._decode(batch).cpu(), VOLUME)

    def _encode(self, video: Tensor) -> Tensor:
        large = video[0, 0].numel() > TILED_PIXELS
        return encode_tiled(self.vae, video) if large else self.vae.encode(video)

    def _decode(self, latent: Tensor) -> Tensor:
        large = latent[0, 0].numel() * VOLUME > TILED_PIXELS
        return decode_tiled(self.vae, latent) if large else self.vae.decode(latent)


def _by_shape(
    items: Sequence[Tensor], work: Callable[[Tensor], Tensor], pixels: int
) -> list[Tensor]:
    """`work` on batches of items of equal shape, about BATCH_PIXELS at a time; results in order."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[item.shape].append(number)
    results: dict[int, Tensor] = {}
    for shape, numbers in groups.items():
        at_once = max(1, BATCH_PIXELS // (shape[1:].numel() * pixels))
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            done = work(torch.stack([items[number] for number in part]))
            results.update(zip(part, done, strict=True))
    return [results[number] for number in range(len(items))]


def load_stack(folder: Path, device: torch.device | str = "cpu") -> Stack:
    """The DiT and the VAE of a checkpoint folder.

    Raises ValueError naming the file that is missing, unreadable or does not fit.
    """
    dit, words = load_dit(folder, device)
    return Stack(dit, load_vae(folder, device=device), words)
