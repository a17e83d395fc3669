"""Encoding and decoding in tiles of space and chunks of time: large videos in bounded memory.

Each tile is computed with as many latents around it as its convolutions can see, streamed through
time, and cropped. No statistic of the VAE mixes places or frames, so tiles fit together exactly:
there is nothing to blend. Memory is the result, and the activations of one tile and one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from model.vae import (
    SPACE_STRIDE,
    TIME_STRIDE,
    Decoder,
    Down,
    Encoder,
    SpaceConv,
    Up,
    VideoVAE,
    pad_video,
)

TILE = (64, 64)
CHUNK = 2


class Tile(NamedTuple):
    """Along one axis, in latents: what is kept, and what is computed to get it."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int


def halo(side: Encoder | Decoder) -> int:
    """How far, in latents, a place sees: one latent for every 3x3 convolution at the latents'
    resolution, half of one where the resolution is twice that."""
    resolution = 2 if isinstance(side, Encoder) else 1
    reach = Fraction(0)
    for layer in (side.stem, *side.blocks, side.head):
        reach += Fraction(sum(isinstance(m, SpaceConv) for m in layer.modules()), resolution)
        if isinstance(layer, Down) and layer.factor > 1:
            resolution = 1
        if isinstance(layer, Up) and layer.factor > 1:
            resolution = 2
    return math.ceil(reach)


def tiles(length: int, tile: int, around: int) -> list[Tile]:
    """Cuts 0 .. length into tiles, each with up to ``around`` more on both sides."""
    if tile < 1:
        raise ValueError(f"tile: expected at least 1 latent, got {tile}")
    cuts = [(start, min(start + tile, length)) for start in range(0, length, tile)]
    return [Tile(a, b, max(0, a - around), min(length, b + around)) for a, b in cuts]


def _grid(
    height: int, width: int, tile: tuple[int, int], around: int
) -> Iterator[tuple[Tile, Tile]]:
    for down in tiles(height, tile[0], around):
        for right in tiles(width, tile[1], around):
            yield down, right


def _pixels(start: int, stop: int, origin: int = 0) -> slice:
    return slice((start - origin) * SPACE_STRIDE, (stop - origin) * SPACE_STRIDE)


@torch.no_grad()
def decode_tiled(
    vae: VideoVAE, latent: Tensor, tile: tuple[int, int] = TILE, chunk: int = CHUNK
) -> Tensor:
    """``vae.decode(latent)`` in tiles of ``tile`` latents, ``chunk`` latent frames at a time.

    latent: [B, C, t, h, w] -> [B, 3, 1 + 4 (t - 1), 8 h, 8 w] in [-1, 1].
    """
    if latent.dim() != 5 or 0 in latent.shape:
        raise ValueError(f"latent: expected [B, C, t, h, w], got {tuple(latent.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 latent frame, got {chunk}")
    batch, _, frames, height, width = latent.shape
    video = latent.new_empty(
        batch, 3, 1 + TIME_STRIDE * (frames - 1), height * SPACE_STRIDE, width * SPACE_STRIDE
    )
    for down, right in _grid(height, width, tile, halo(vae.decoder)):
        part = latent[..., down.outer_start : down.outer_stop, right.outer_start : right.outer_stop]
        inner = (
            _pixels(down.start, down.stop, down.outer_start),
            _pixels(right.start, right.stop, right.outer_start),
        )
        outer = (_pixels(down.start, down.stop), _pixels(right.start, right.stop))
        at = 0
        for piece in vae.decode_stream(part.split(chunk, dim=2)):
            video[(..., slice(at, at + piece.shape[2]), *outer)] = piece[(..., *inner)]
            at += piece.shape[2]
    return video


@torch.no_grad()
def encode_tiled(
    vae: VideoVAE, video: Tensor, tile: tuple[int, int] = TILE, chunk: int = CHUNK
) -> Tensor:
    """``vae.encode(video)`` in tiles of ``tile`` latents, ``chunk`` latent frames at a time.

    video: [B, 3, T, H, W] in [-1, 1], padded as ``vae.encode`` pads -> [B, C, t, h, w].
    """
    if video.dim() != 5 or 0 in video.shape:
        raise ValueError(f"video: expected [B, 3, T, H, W], got {tuple(video.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 latent frame, got {chunk}")
    video = pad_video(video)
    batch, _, frames, height, width = video.shape
    height, width = height // SPACE_STRIDE, width // SPACE_STRIDE
    latent = video.new_empty(
        batch, vae.config.latent_channels, 1 + (frames - 1) // TIME_STRIDE, height, width
    )
    for down, right in _grid(height, width, tile, halo(vae.encoder)):
        part = video[
            ...,
            _pixels(down.outer_start, down.outer_stop),
            _pixels(right.outer_start, right.outer_stop),
        ]
        inner = (
            slice(down.start - down.outer_start, down.stop - down.outer_start),
            slice(right.start - right.outer_start, right.stop - right.outer_start),
        )
        outer = (slice(down.start, down.stop), slice(right.start, right.stop))
        at = 0
        for piece in vae.encode_stream(part.split(chunk * TIME_STRIDE, dim=2)):
            latent[(..., slice(at, at + piece.shape[2]), *outer)] = piece[(..., *inner)]
            at += piece.shape[2]
    return latent
