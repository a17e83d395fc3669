"""One mechanism for every mode: a clip is a packed segment made of parts, each with its own time.

    text to video    [Text, Grid(all frames)]
    image to video   [Text, Grid(first latent, given), Grid(the rest)]
    extend           [Text, Grid(first latents, given), Grid(the rest)]

Given parts are clean: their rows of the modulation say t = 0 and "given". All parts of a segment
attend to each other, and positions say where in the clip a part sits: no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels.packing import Grid, PackedLayout, Part, Text
from sora_kernels.rows import RowMap

TEXT, TARGET, GIVEN = 0, 1, 2
KINDS = 3


@dataclass(frozen=True)
class Rows:
    """Rows of the modulation: `times` fp32 [R], `kinds` int64 [R], and which token reads which."""

    times: Tensor
    kinds: Tensor
    map: RowMap


def clip_segment(
    words: int, latent: tuple[int, int, int], patch: tuple[int, int, int], given: int = 0
) -> list[Part]:
    """Parts of one clip: `words` text tokens, then its grid, of which the first `given` tokens
    along time are known. `latent` is the latent's (T, H, W) and must be a multiple of `patch`."""
    for size, step, axis in zip(latent, patch, ("time", "height", "width"), strict=True):
        if size < 1 or size % step:
            raise ValueError(
                f"latent: expected {axis} to be a positive multiple of {step}, got {size}"
            )
    t, h, w = (size // step for size, step in zip(latent, patch, strict=True))
    if not 0 <= given < t:
        raise ValueError(f"given: expected 0 to {t - 1} of {t} token frames, got {given}")
    parts: list[Part] = [Text(words)]
    if given:
        parts.append(Grid(given, h, w, given=True))
    parts.append(Grid(t - given, h, w, origin=(float(given), 0.0, 0.0)))
    return parts


def part_kinds(layout: PackedLayout) -> list[int]:
    """Kind of every part of the layout, in order."""
    kinds = []
    for segment in layout.segments:
        for part in segment:
            kinds.append(TEXT if isinstance(part, Text) else GIVEN if part.given else TARGET)
    return kinds


def rows_for(layout: PackedLayout, segment_times: Tensor) -> Rows:
    """One row per part: targets take the time of their segment, text and given parts t = 0."""
    if segment_times.shape != (layout.num_segments,):
        raise ValueError(
            f"segment_times: expected [{layout.num_segments}], got {list(segment_times.shape)}"
        )
    segment_of_part = [i for i, segment in enumerate(layout.segments) for _ in segment]
    kinds = torch.tensor(part_kinds(layout), device=segment_times.device)
    owners = torch.tensor(segment_of_part, device=segment_times.device)
    times = torch.where(kinds == TARGET, segment_times.float()[owners], 0.0)
    return Rows(times, kinds, layout.part_rows)


def grids(parts: Sequence[Part]) -> list[Grid]:
    """The grid parts, in order."""
    return [part for part in parts if isinstance(part, Grid)]


def split_given(latent: Tensor, parts: Sequence[Part], patch: tuple[int, int, int]) -> list[Tensor]:
    """Cuts the latent [C, T, H, W] of one clip along time into one tensor per grid part."""
    lengths = [part.t * patch[0] for part in grids(parts)]
    if sum(lengths) != latent.shape[1]:
        raise ValueError(f"latent: expected {sum(lengths)} latent frames, got {latent.shape[1]}")
    return list(latent.split(lengths, dim=1))
