"""One mechanism for every mode: a clip is a packed segment made of parts, each with its own time.

    a segment = [Text, given parts ..., Grid(the clip to make)]

    text to video       nothing given
    image to video      one frame at time 0
    extend              a clip of 5 or 9 frames that ends at time -1, or starts at time T
    connect             both
    fill, more frames   single frames at their times
    loop                the clip itself, once more before and once more behind it

The clip to make is always whole: it decodes alone, and known pixels are pasted back afterwards.
Given parts are encoded on their own and clean: their rows of the modulation say t = 0 and "given".
All parts of a segment attend to each other, and positions say when and where a part sits: no mask
is needed. Times are in frames of the clip to make, 0 its first one; they may lie before it, behind
it, or between its frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.vae import TIME_STRIDE
from sora_kernels.packing import Grid, PackedLayout, Part, Text
from sora_kernels.rows import RowMap

TEXT, TARGET, GIVEN = 0, 1, 2
KINDS = 3


@dataclass(frozen=True)
class GivenClip:
    """Known pixels [3, T, H, W] in [-1, 1]; frame k is at time `time + k * step`."""

    video: Tensor
    time: float
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.video.dim() != 4 or self.video.shape[0] != 3 or 0 in self.video.shape:
            raise ValueError(f"video: expected [3, T, H, W], got {list(self.video.shape)}")
        check_times(self.time, self.step)


@dataclass(frozen=True)
class Given:
    """The latent [C, T, H, W] of a `GivenClip`, encoded on its own."""

    latent: Tensor
    time: float
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.latent.dim() != 4:
            raise ValueError(f"latent: expected [C, T, H, W], got {list(self.latent.shape)}")
        check_times(self.time, self.step)


def check_times(time: float, step: float) -> None:
    """Raises ValueError unless they place frames."""
    if not math.isfinite(time):
        raise ValueError(f"time: expected a finite number of frames, got {time}")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step: expected a positive number of frames, got {step}")


@dataclass(frozen=True)
class Rows:
    """Rows of the modulation: `times` fp32 [R], `kinds` int64 [R], and which token reads which."""

    times: Tensor
    kinds: Tensor
    map: RowMap


def token_grid(latent: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(t, h, w) tokens of a latent of size (T, H, W), which must be a multiple of `patch`."""
    for size, step, axis in zip(latent, patch, ("time", "height", "width"), strict=True):
        if size < 1 or size % step:
            raise ValueError(
                f"latent: expected {axis} to be a positive multiple of {step}, got {size}"
            )
    t, h, w = (size // step for size, step in zip(latent, patch, strict=True))
    return t, h, w


def given_grid(given: Given, main: tuple[int, int, int], patch: tuple[int, int, int]) -> Grid:
    """Where a given part sits beside a clip to make of `main` tokens.

    Latent i of a clip ends with its frame 4 i, so it is `time + 4 i step` frames away from latent 0
    of the clip to make, whose latents are 4 frames apart. A part of another height or width covers
    the same picture: the centres of the outer pixels' cells coincide.
    """
    t, h, w = token_grid(given.latent.shape[1:], patch)
    down, right = main[1] / h, main[2] / w
    return Grid(
        t, h, w,
        origin=(given.time / (TIME_STRIDE * patch[0]), (down - 1) / 2, (right - 1) / 2),
        scale=(given.step, down, right),
        given=True,
    )  # fmt: skip


def clip_segment(
    words: int,
    latent: Sequence[int],
    patch: tuple[int, int, int],
    given: Sequence[Given] = (),
    loop: bool = False,
) -> list[Part]:
    """Parts of one clip: `words` text tokens, what is given, then the clip of latent (T, H, W).

    loop: latents 1 to T - 1 stand once more before the clip and once more behind it, at the time
    of the clip, so that its ends see each other where they meet: latent T - 1 holds the frame of
    latent 0.
    """
    main = token_grid(latent, patch)
    parts: list[Part] = [Text(words), *(given_grid(part, main, patch) for part in given)]
    if loop:
        if patch[0] != 1 or main[0] < 2:
            raise ValueError(
                f"loop: expected 2 latents or more and a patch of 1, got {main[0]} and {patch[0]}"
            )
        t, h, w = main
        parts += [Grid(t - 1, h, w, origin=(at, 0.0, 0.0)) for at in (2.0 - t, float(t))]
    return [*parts, Grid(*main)]


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
