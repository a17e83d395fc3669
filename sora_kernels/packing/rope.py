"""Rotary embedding tables of a packed batch.

Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), on three axes as video models use
it: the head dimension is split over (t, h, w), and the pairs of axis `a` turn by `position_a *
frequency`. Angles are formed in fp64 and only their cosines and sines are rounded to fp32: an fp32
angle is off by 5e-3 at position 100,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .parts import as_int

PerAxis: TypeAlias = float | Sequence[float]
FloatArray: TypeAlias = npt.NDArray[np.float64]


# What kernels know of a part. `last` is the offset of its last token; a part that is not turned
# (text, padding) has 0 there, grid 1x1x1 and the row of position 0. The tile is absent in raster
# order, where the whole grid is one tile.
POSITION_COLUMNS = ("start", "last", "h", "w", "row_t", "row_h", "row_w")
TILE_COLUMNS = ("t", "tile_t", "tile_h", "tile_w")


@dataclass(frozen=True)
class GridPositions:
    """Rows of the tables that follow from the grids of a layout: nothing is kept per token.

    Token `n` of these is token `first_token + n` of the pack, which is number `first_token + n -
    start` of its part. `tiles` says how that gives the coordinates (t, h, w) in the part's grid;
    the row of an axis is the part's first one on it plus the coordinate. Kernels do the same.

    Attributes:
        part_of_token: int32 `[N]`, the layout's own.
        parts: int32, `part_size` values for each part: `POSITION_COLUMNS`, and in tile order
            `TILE_COLUMNS`. The last part holds no token: padding takes it. Not a matrix, because
            torch.compile ties small sizes that happen to be equal (heads, the 3 of a packed QKV)
            to each other and compiles again when they differ.
        part_size: 7 in raster order, 11 in tile order.
        first_token: where a slice begins.
    """

    part_of_token: Tensor
    parts: Tensor
    part_size: int
    first_token: int = 0

    def rows(self) -> Tensor:
        """The row of each token on each axis, int32 `[N, 3]`."""
        part = self.parts.view(-1, self.part_size).index_select(0, self.part_of_token)
        start, last, h, w = part[:, :4].unbind(1)
        token = torch.arange(len(part), dtype=torch.int32, device=part.device) + self.first_token
        offset = torch.minimum((token - start).clamp_(min=0), last)
        tiled = self.part_size > len(POSITION_COLUMNS)
        size, tile = ((part[:, 7], h, w), part[:, 8:].unbind(1)) if tiled else ((None, h, w), None)
        return part[:, 4:7] + token_coordinates(offset, size, tile)

    def slice(self, start: int, stop: int) -> GridPositions:
        part_of_token, first = self.part_of_token[start:stop], self.first_token + start
        return replace(self, part_of_token=part_of_token, first_token=first)

    def padded(self, before: int, after: int) -> GridPositions:
        still = len(self.parts) // self.part_size - 1
        part_of_token = functional.pad(self.part_of_token, (before, after), value=still)
        return replace(self, part_of_token=part_of_token, first_token=self.first_token - before)

    def to(self, device: torch.device | str) -> GridPositions:
        part_of_token, parts = (
            x.to(device, non_blocking=True) for x in (self.part_of_token, self.parts)
        )
        return replace(self, part_of_token=part_of_token, parts=parts)


def token_coordinates(
    offset: Tensor, size: Sequence[Tensor | None], tile: Sequence[Tensor] | None
) -> Tensor:
    """(t, h, w) `[N, 3]` of token number `offset` of a grid, all int32 `[N]`.

    `tile=None` means raster order, which asks nothing of t. The inverse of `tile_order`, as the
    kernels have it (`ops/_grid.py`, `csrc/common/grid.h`).
    """
    t, h, w = size
    assert h is not None and w is not None
    if tile is None:
        row = offset // w
        return torch.stack((row // h, row % h, offset % w), 1)
    assert t is not None
    tile_t, tile_h, tile_w = tile
    plane = tile_t * h * w
    t0 = offset // plane * tile_t
    offset = offset % plane
    extent_t = torch.minimum(tile_t, t - t0)
    row = extent_t * tile_h * w
    h0 = offset // row * tile_h
    offset = offset % row
    extent_h = torch.minimum(tile_h, h - h0)
    column = extent_t * extent_h * tile_w
    w0 = offset // column * tile_w
    offset = offset % column
    extent_w = torch.minimum(tile_w, w - w0)
    row = offset // extent_w
    return torch.stack((t0 + row // extent_h, h0 + row % extent_h, w0 + offset % extent_w), 1)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of a packed batch: one small table and which rows of it each token takes.

    Token `n` turns pair `j` by the angle whose cosine is `cos[position_index[n, a], j]`, where `a`
    is the axis that owns pair `j` (`axis_of_pair[j]`).

    Attributes:
        cos, sin: fp32 `[P, r/2]`; P counts the positions in the tables. Or `[P, H, r/2]` for angles
            that differ per head.
        positions: int32 `[N, A]`, row of the table per token and axis; or, from a layout, the
            `GridPositions` that kernels compute it from.
        axes: rotated features per axis, even, summing to `r`; axis 0 owns the first pairs.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | GridPositions
    axes: tuple[int, ...]

    @staticmethod
    def from_tables(cos: Tensor, sin: Tensor, *, per_head: bool = False) -> Rope:
        """Uses given tables, one row per token, of whatever a model computes.

        Args:
            cos, sin: floating `[N, r/2]`, or `[B, L, r/2]` for samples that differ. With
                `per_head` (Mochi, LTX) there is a dimension of heads before the last.

        Raises:
            TypeError: a table is not a floating tensor.
            ValueError: shapes or devices differ, or the tables have too few dimensions.
        """
        for name, table in (("cos", cos), ("sin", sin)):
            if not isinstance(table, Tensor) or not table.is_floating_point():
                raise TypeError(f"{name}: expected a floating tensor, got {_describe(table)}")
        least = 3 if per_head else 2
        if cos.dim() not in (least, least + 1) or cos.shape != sin.shape:
            raise ValueError(
                f"cos, sin: expected one shape {'[N, H, r/2]' if per_head else '[N, r/2]'}, or "
                f"with a batch before it, got {_describe(cos)} and {_describe(sin)}"
            )
        if cos.device != sin.device:
            raise ValueError(f"sin: expected the device of cos, {cos.device}, got {sin.device}")
        if cos.dim() > least:
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        index = torch.arange(cos.shape[0], dtype=torch.int32, device=cos.device)[:, None]
        return Rope(cos.float().contiguous(), sin.float().contiguous(), index, (2 * cos.shape[-1],))

    def padded(self, before: int = 0, after: int = 0) -> Rope:
        """Tokens that are not turned (text, padding) around these: angle 0 on every axis."""
        before, after = as_int("before", before, 0), as_int("after", after, 0)
        if isinstance(self.positions, GridPositions):
            return Rope(self.cos, self.sin, self.positions.padded(before, after), self.axes)
        still = [torch.full_like(t[:1], value) for t, value in ((self.cos, 1.0), (self.sin, 0.0))]
        cos, sin = torch.cat((self.cos, still[0])), torch.cat((self.sin, still[1]))
        index = functional.pad(self.positions, (0, 0, before, after), value=len(self.cos))
        return Rope(cos, sin, index, self.axes)

    @property
    def position_index(self) -> Tensor:
        """int32 `[N, A]`, row of the table per token and axis; computed if it is not given."""
        if isinstance(self.positions, GridPositions):
            return self.positions.rows()
        return self.positions

    @property
    def num_tokens(self) -> int:
        if isinstance(self.positions, GridPositions):
            return self.positions.part_of_token.shape[0]
        return self.positions.shape[0]

    @property
    def rotary_dim(self) -> int:
        """r, the number of rotated features per head."""
        return 2 * self.cos.shape[-1]

    @property
    def axis_of_pair(self) -> tuple[int, ...]:
        """The axis that owns each pair, `[r/2]` host integers."""
        return tuple(a for a, size in enumerate(self.axes) for _ in range(size // 2))

    def dense(self) -> tuple[Tensor, Tensor]:
        """The tables per token, fp32 `[N, r/2]` or `[N, H, r/2]`: for references and tests."""
        tables = []
        index = self.position_index
        single = index.shape[1] == 1
        for table in (self.cos, self.sin):
            columns = []
            start = 0
            for axis, size in enumerate(self.axes):
                column = table[..., start : start + size // 2]
                rows = index[:, 0 if single else axis]
                columns.append(column.index_select(0, rows))
                start += size // 2
            tables.append(torch.cat(columns, dim=-1))
        return tables[0], tables[1]

    def slice(self, start: int, stop: int) -> Rope:
        """The tables of tokens `[start, stop)`; shares memory with this one."""
        if isinstance(self.positions, GridPositions):
            return Rope(self.cos, self.sin, self.positions.slice(start, stop), self.axes)
        return Rope(self.cos, self.sin, self.positions[start:stop], self.axes)

    def to(self, device: torch.device | str) -> Rope:
        """The same tables on `device`."""
        cos, sin = (x.to(device, non_blocking=True) for x in (self.cos, self.sin))
        return Rope(cos, sin, self.positions.to(device), self.axes)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return repr(value)


def check_axes(axes: Any) -> tuple[int, int, int]:
    """`axes` as three even sizes with a positive sum, or a ValueError."""
    sizes = tuple(axes) if isinstance(axes, Sequence) else ()
    if len(sizes) != 3:
        raise ValueError(f"axes: expected three even sizes (t, h, w), got {axes!r}")
    t, h, w = (as_int(f"axes[{i}]", size, 0) for i, size in enumerate(sizes))
    if t % 2 or h % 2 or w % 2 or t + h + w == 0:
        raise ValueError(f"axes: expected even sizes with a positive sum, got {axes!r}")
    return t, h, w


def per_axis(name: str, value: PerAxis) -> tuple[float, float, float]:
    """One positive number for every axis, or three of them."""
    values = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name}: expected a positive number, or one per axis, got {value!r}")
    return float(values[0]), float(values[1]), float(values[2])


def axis_frequencies(
    axes: tuple[int, int, int],
    theta: tuple[float, float, float],
    ntk: tuple[float, float, float],
    interpolation: tuple[float, float, float],
) -> list[FloatArray]:
    """Angle per unit of position of each pair, fp64, per axis.

    `theta ** (-2*i / d)` over `interpolation` (position interpolation, arXiv 2306.15595), where
    theta is first multiplied by `ntk ** (d / (d - 2))` (NTK-aware scaling: the lowest frequency is
    divided by `ntk`, the highest stays).
    """
    frequencies = []
    for d, base, stretch, divisor in zip(axes, theta, ntk, interpolation, strict=True):
        scaled = base * stretch ** (d / (d - 2)) if d > 2 else base
        exponent = np.arange(0, d, 2, dtype=np.float64) / max(d, 1)
        frequencies.append(scaled**-exponent / divisor)
    return frequencies


def check_frequencies(axes: tuple[int, int, int], frequencies: Any) -> list[FloatArray]:
    """Given frequencies, one array of `axes[a] / 2` finite numbers per axis, or a ValueError."""
    arrays = [np.asarray(row, np.float64) for row in frequencies]
    if len(arrays) != 3 or any(
        row.shape != (size // 2,) or not np.isfinite(row).all()
        for row, size in zip(arrays, axes, strict=False)
    ):
        raise ValueError(
            f"frequencies: expected three sequences of {[size // 2 for size in axes]} finite "
            f"numbers, got shapes {[row.shape for row in arrays]}"
        )
    return arrays


def angle_tables(
    positions: FloatArray, frequencies: Sequence[FloatArray]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin fp32 `[P, r/2]` of the angles `positions * frequency`, formed in fp64."""
    angles = positions[:, None] * np.concatenate(list(frequencies))[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
