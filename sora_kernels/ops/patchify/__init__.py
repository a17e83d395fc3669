"""Videos of different sizes <-> one packed token matrix: `patchify` and `unpatchify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backend
from .reference import patchify_reference, raster_order, unpatchify_reference

if TYPE_CHECKING:
    from ...packing import PackedLayout

__all__ = ["patchify", "unpatchify"]

_OP = "patchify"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patchify(videos: Sequence[Tensor], layout: PackedLayout, *, pad: str | None = None) -> Tensor:
    """Cuts videos into spacetime patches, in the token order of the layout.

    Args:
        videos: one ``[C, T, H, W]`` per grid part of the layout, in packed order; fp32, bf16 or
            fp16 (fp64: reference), any strides. T, H, W are exactly the part's grid times the
            patch, unless ``pad`` says how smaller ones are filled up.
        layout: the pack; ``layout.patch`` is (pt, ph, pw), ``layout.order`` raster or tile.
        pad: None refuses a video whose size is no multiple of the patch. ``"zeros"`` and
            ``"replicate"`` (the last frame, row or column again) fill such a video up at the end
            of each axis, by less than a patch; ``PackedLayout.from_grids(..., pad=True)`` makes
            the layout for it. Only such videos are copied for that.

    Returns:
        ``[Ng, C*pt*ph*pw]`` contiguous, Ng the number of grid tokens (without text), features
        ordered (c, pt, ph, pw). ``unpatchify`` is the inverse, and the gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    geometry = _geometry(layout)
    if pad is not None:
        videos = _padded(videos, geometry, pad)
    _check_videos(videos, geometry)
    chosen = backend.choose(_OP, videos[0])
    if chosen == "reference":
        return torch.cat(
            [
                patchify_reference(x, geometry.patch, raster_order(grid, tile, x.device))
                for x, grid, tile in zip(videos, *_triples(geometry), strict=True)
            ]
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in videos):
        tokens: Tensor = _Patchify.apply(chosen, geometry, *videos)
        return tokens
    return _to_tokens(chosen, list(videos), geometry)


def unpatchify(
    tokens: Tensor,
    layout: PackedLayout,
    channels: int,
    *,
    sizes: Sequence[Sequence[int]] | None = None,
) -> list[Tensor]:
    """The inverse of :func:`patchify`: tokens back to one video per grid part.

    Args:
        tokens: ``[Ng, C*pt*ph*pw]``, grid tokens in packed order (``hidden[layout.grid_tokens]``
            if the pack holds text), ``stride(-1) == 1``; dtypes as for :func:`patchify`.
        layout: the pack.
        channels: C.
        sizes: (T, H, W) of each video before ``patchify`` padded it; None = nothing was padded.

    Returns:
        One contiguous ``[C, T, H, W]`` per grid part; of a padded one the view without padding.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.
    """
    geometry = _geometry(layout)
    _check_tokens(tokens, geometry, channels)
    if sizes is not None:
        whole = unpatchify(tokens, layout, channels)
        return [
            x[:, :t, :h, :w]
            for x, (t, h, w) in zip(whole, _check_sizes(sizes, geometry), strict=True)
        ]
    chosen = backend.choose(_OP, tokens)
    if chosen == "reference":
        grids, tiles = _triples(geometry)
        pieces = tokens.split([t * h * w for t, h, w in grids])
        return [
            unpatchify_reference(x, grid, geometry.patch, raster_order(grid, tile, x.device))
            for x, grid, tile in zip(pieces, grids, tiles, strict=True)
        ]
    if torch.is_grad_enabled() and tokens.requires_grad and geometry.grids:
        return list(_Unpatchify.apply(chosen, geometry, channels, tokens))
    return _to_videos(chosen, tokens, geometry, channels)


# --- geometry and checks ------------------------------------------------------------------------


class _Geometry(NamedTuple):
    grids: list[int]  # t, h, w of each grid part, one after the other
    tiles: list[int]  # its tile; the grid itself in raster order
    patch: tuple[int, int, int]


def _geometry(layout: PackedLayout) -> _Geometry:
    from ...packing import Grid

    grids: list[int] = []
    tiles: list[int] = []
    for part in layout.parts:
        if isinstance(part, Grid):
            grid = (part.t, part.h, part.w)
            grids += grid
            tiles += grid if layout.order == "raster" else layout.tile_of(part)
    return _Geometry(grids, tiles, layout.patch)


def _triples(geometry: _Geometry) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    def cut(flat: list[int]) -> list[tuple[int, ...]]:
        return [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]

    return cut(geometry.grids), cut(geometry.tiles)


PADS = {"zeros": "constant", "replicate": "replicate"}


def _padded(videos: Sequence[Tensor], geometry: _Geometry, pad: str) -> list[Tensor]:
    """Videos filled up at their ends to grid times patch, where that takes less than a patch."""
    if pad not in PADS:
        raise ValueError(f"pad: expected one of {list(PADS)} or None, got {pad!r}")
    filled = []
    for x, full in zip(videos, _full_sizes(geometry), strict=False):
        if isinstance(x, Tensor) and x.ndim == 4 and x.numel():
            short = [n - have for n, have in zip(full, x.shape[1:], strict=True)]
            if any(short) and all(
                0 <= gap < p for gap, p in zip(short, geometry.patch, strict=True)
            ):
                x = F.pad(x, (0, short[2], 0, short[1], 0, short[0]), mode=PADS[pad])
        filled.append(x)
    return [*filled, *videos[len(filled) :]]


def _full_sizes(geometry: _Geometry) -> list[tuple[int, ...]]:
    return [
        tuple(g * p for g, p in zip(grid, geometry.patch, strict=True))
        for grid in _triples(geometry)[0]
    ]


def _check_sizes(sizes: Sequence[Sequence[int]], geometry: _Geometry) -> Sequence[Sequence[int]]:
    full = _full_sizes(geometry)
    if len(sizes) != len(full):
        raise ValueError(f"sizes: expected {len(full)}, one per grid part, got {len(sizes)}")
    for i, (size, most) in enumerate(zip(sizes, full, strict=True)):
        if len(size) != 3 or any(
            not m - p < n <= m for n, m, p in zip(size, most, geometry.patch, strict=True)
        ):
            raise ValueError(
                f"sizes[{i}]: expected less than a patch {geometry.patch} below {most}, got "
                f"{tuple(size)}"
            )
    return sizes


def _check_videos(videos: Sequence[Tensor], geometry: _Geometry) -> None:
    count = len(geometry.grids) // 3
    if len(videos) != count or count == 0:
        raise ValueError(
            f"videos: expected {count or 'a layout with at least one grid and'} of them, one per "
            f"grid part of the layout, got {len(videos)}"
        )
    first = videos[0]
    for i, x in enumerate(videos):
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"videos[{i}]: expected an fp32, bf16, fp16 or fp64 tensor, got {got}")
        t, h, w = (
            g * p for g, p in zip(geometry.grids[3 * i : 3 * i + 3], geometry.patch, strict=True)
        )
        if x.ndim != 4 or x.shape[0] < 1 or x.shape[1:] != (t, h, w):
            raise ValueError(
                f"videos[{i}]: expected [C, {t}, {h}, {w}], its grid in the layout times the "
                f"patch {geometry.patch}, got {tuple(x.shape)}"
            )
        if x.dtype != first.dtype or x.shape[0] != first.shape[0] or x.device != first.device:
            raise ValueError(
                f"videos[{i}]: expected {first.shape[0]} channels of {first.dtype} on "
                f"{first.device} as videos[0] has, got {x.shape[0]} of {x.dtype} on {x.device}"
            )


def _check_tokens(tokens: Tensor, geometry: _Geometry, channels: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in _DTYPES:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: expected an fp32, bf16, fp16 or fp64 tensor, got {got}")
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    rows = _num_tokens(geometry.grids)
    width = _features(channels, geometry.patch)
    if tokens.ndim != 2 or tokens.shape != (rows, width):
        raise ValueError(
            f"tokens: expected [{rows}, {width}], the layout's grid tokens by {channels} channels "
            f"of patch {geometry.patch}, got {tuple(tokens.shape)}"
        )
    if width > 1 and tokens.stride(1) != 1:
        raise ValueError(f"tokens: expected stride 1 in the last dimension, got {tokens.stride()}")


def _num_tokens(grids: Sequence[int]) -> int:
    return sum(grids[i] * grids[i + 1] * grids[i + 2] for i in range(0, len(grids), 3))


def _features(channels: int, patch: Sequence[int]) -> int:
    return channels * patch[0] * patch[1] * patch[2]


# --- autograd: each direction is the gradient of the other --------------------------------------


def _to_tokens(chosen: str, videos: list[Tensor], geometry: _Geometry) -> Tensor:
    tokens: Tensor = backend.implementation(_OP, "fwd", chosen, videos[0])(videos, *geometry)
    return tokens


def _to_videos(chosen: str, tokens: Tensor, geometry: _Geometry, channels: int) -> list[Tensor]:
    run = backend.implementation(_OP, "bwd", chosen, tokens)
    videos: list[Tensor] = run(tokens, *geometry, channels)
    return videos


class _Patchify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: str, geometry: _Geometry, *videos: Tensor) -> Tensor:
        ctx.args = chosen, geometry, videos[0].shape[0]
        return _to_tokens(chosen, list(videos), geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtokens: Tensor) -> tuple[Any, ...]:
        chosen, geometry, channels = ctx.args
        dtokens = dtokens if dtokens.stride(1) == 1 else dtokens.contiguous()
        return None, None, *_to_videos(chosen, dtokens, geometry, channels)


class _Unpatchify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chosen: str, geometry: _Geometry, channels: int, tokens: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.args = chosen, geometry
        return tuple(_to_videos(chosen, tokens, geometry, channels))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dvideos: Tensor) -> tuple[Any, ...]:
        chosen, geometry = ctx.args
        return None, None, None, _to_tokens(chosen, list(dvideos), geometry)


# --- registration -------------------------------------------------------------------------------


def new_tokens(videos: Sequence[Tensor], grids: Sequence[int], patch: Sequence[int]) -> Tensor:
    return videos[0].new_empty((_num_tokens(grids), _features(videos[0].shape[0], patch)))


def new_videos(
    tokens: Tensor, grids: Sequence[int], patch: Sequence[int], channels: int
) -> list[Tensor]:
    pt, ph, pw = patch
    return [
        tokens.new_empty((channels, grids[i] * pt, grids[i + 1] * ph, grids[i + 2] * pw))
        for i in range(0, len(grids), 3)
    ]


def _fake_fwd(
    videos: Sequence[Tensor], grids: Sequence[int], tiles: Sequence[int], patch: Sequence[int]
) -> Tensor:
    return new_tokens(videos, grids, patch)


def _fake_bwd(
    tokens: Tensor, grids: Sequence[int], tiles: Sequence[int], patch: Sequence[int], channels: int
) -> list[Tensor]:
    return new_videos(tokens, grids, patch, channels)


backend.register(
    _OP,
    "(Tensor[] videos, SymInt[] grids, SymInt[] tiles, SymInt[] patch) -> Tensor",
    "(Tensor tokens, SymInt[] grids, SymInt[] tiles, SymInt[] patch, SymInt channels) -> Tensor[]",
    _fake_fwd,
    _fake_bwd,
)
