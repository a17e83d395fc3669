"""Triton device functions: where a token of a packed layout sits in its grid, by arithmetic.

Token number -> coordinates, for both orders that `packing.tiles` describes. All int32, and
unsigned inside: an unsigned division costs two thirds of a signed one. What a part is made of comes
from the layout's position table (`packing.rope.GridPositions`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..packing.rope import POSITION_COLUMNS

RASTER_PART = tl.constexpr(len(POSITION_COLUMNS))


@triton.jit
def raster_coordinates(offset, h, w):
    """(t, h, w) of token number ``offset`` of a grid; w fastest."""
    row = offset // w
    t = row // h
    return t, row - t * h, offset - row * w


@triton.jit
def tile_coordinates(offset, t, h, w, tile_t, tile_h, tile_w):
    """(t, h, w) of token number ``offset`` of a grid that is stored tile after tile.

    Slabs of tile_t planes, in them rows of tile_h, in them tiles; the last of each may be thinner.
    """
    plane = tile_t * h * w
    slab = offset // plane
    offset -= slab * plane
    t0 = slab * tile_t
    extent_t = tl.minimum(tile_t, t - t0)
    size = extent_t * tile_h * w
    row = offset // size
    offset -= row * size
    h0 = row * tile_h
    extent_h = tl.minimum(tile_h, h - h0)
    size = extent_t * extent_h * tile_w
    column = offset // size
    offset -= column * size
    w0 = column * tile_w
    extent_w = tl.minimum(tile_w, w - w0)
    inner_t, inner_h, inner_w = raster_coordinates(offset, extent_h, extent_w)
    return t0 + inner_t, h0 + inner_h, w0 + inner_w


@triton.jit
def _column(part_ptr, column, mask):
    """One column of the parts of some tokens. 1 where masked: sizes are divisors."""
    return tl.load(part_ptr + column, mask=mask, other=1).to(tl.uint32)


@triton.jit
def position_rows(part_of_token_ptr, parts_ptr, part_size, first_token, token, mask):
    """Rows (t, h, w) of the rotary tables that each token takes, int32.

    ``token`` counts from ``first_token`` of the pack. ``part_size`` is 7 in raster order and 11 in
    tile order. Offsets are clamped to the part, so that no row outside the tables is read.
    """
    part = tl.load(part_of_token_ptr + token, mask=mask, other=0)
    part_ptr = parts_ptr + part * part_size
    start = tl.load(part_ptr, mask=mask, other=0)
    last = tl.load(part_ptr + 1, mask=mask, other=0)
    offset = tl.minimum(tl.maximum(token.to(tl.int32) + first_token - start, 0), last)
    offset = offset.to(tl.uint32)
    h = _column(part_ptr, 2, mask)
    w = _column(part_ptr, 3, mask)
    if part_size > RASTER_PART:
        t = _column(part_ptr, 7, mask)
        tile_t = _column(part_ptr, 8, mask)
        tile_h = _column(part_ptr, 9, mask)
        tile_w = _column(part_ptr, 10, mask)
        at_t, at_h, at_w = tile_coordinates(offset, t, h, w, tile_t, tile_h, tile_w)
    else:
        at_t, at_h, at_w = raster_coordinates(offset, h, w)
    row_t = (_column(part_ptr, 4, mask) + at_t).to(tl.int32)
    row_h = (_column(part_ptr, 5, mask) + at_h).to(tl.int32)
    row_w = (_column(part_ptr, 6, mask) + at_w).to(tl.int32)
    return row_t, row_h, row_w
