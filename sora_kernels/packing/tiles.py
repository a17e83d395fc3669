"""Tile order: where the tokens of a grid are stored when a grid is stored tile after tile.

The grid (T, H, W) is cut into tiles of (a, b, c) tokens; the last tile of an axis may be smaller
and is not padded. Tiles follow each other in raster order (w fastest), and so do the tokens in a
tile. With the extents that tile (i, j, k) really has, `ta = min(a, T - i*a)` and
`tb = min(b, H - j*b)`, the tile starts at

    i*a*H*W  +  ta * j*b*W  +  ta*tb * k*c                                          (`tile_start`)

so tiles that are adjacent along w are one contiguous run of tokens, and a kernel walks the keys of
a 3-D window as (t tiles x h tiles) runs by arithmetic alone, without a permutation or a block list.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .parts import Triple

QUERY_BLOCK = 128
"""Rows of a query block that `block_efficiency` assumes: what one program of the kernels reads."""

# (6, 8, 8), three blocks, is what sliding-tile attention was trained with on video; (1, 16, 16) is
# two blocks of an image.
_PREFERRED_T = 6
_PREFERRED_SIDE = 8
_PREFERRED_IMAGE_SIDE = 16
_ONE_TILE = 384
_ENOUGH = 0.92
_EFFICIENCY_WEIGHT = 6.0


def _blocks(tokens: npt.NDArray[np.int64] | int, block: int) -> npt.NDArray[np.int64]:
    return -(-np.asarray(tokens, np.int64) // block) * block


def _tile_efficiency(
    grid: Triple,
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
    c: npt.NDArray[np.int64],
    block: int,
) -> npt.NDArray[np.float64]:
    """Tokens of the grid over tokens of the query blocks that cover every tile, per candidate."""
    covered = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.int64)
    # Per axis there are n // tile whole tiles and at most one partial tile: eight kinds in all.
    axes = [
        ((n // tile, tile), (np.minimum(n % tile, 1), n % tile))
        for n, tile in zip(grid, (a, b, c), strict=True)
    ]
    for count_t, size_t in axes[0]:
        for count_h, size_h in axes[1]:
            for count_w, size_w in axes[2]:
                covered += count_t * count_h * count_w * _blocks(size_t * size_h * size_w, block)
    return grid[0] * grid[1] * grid[2] / covered


def tile_efficiency(grid: Triple, tile: Triple, block: int = QUERY_BLOCK) -> float:
    """Tokens of `grid` / (tokens of each tile rounded up to whole query blocks, summed)."""
    a, b, c = (np.asarray(min(n, s), np.int64) for n, s in zip(grid, tile, strict=True))
    return float(_tile_efficiency(grid, a, b, c, block))


@lru_cache(maxsize=1)
def _candidates() -> npt.NDArray[np.int64]:
    """Every tile of 0.75 to 4 blocks, int64 `[3, K]`. One of them fits into any larger grid."""
    sizes = [
        (a, b, c)
        for a in range(1, 4 * QUERY_BLOCK + 1)
        for b in range(1, 4 * QUERY_BLOCK // a + 1)
        for c in range(-(-3 * QUERY_BLOCK // (4 * a * b)), 4 * QUERY_BLOCK // (a * b) + 1)
    ]
    return np.asarray(sizes, np.int64).T.copy()


@lru_cache(maxsize=4096)
def tile_shape(t: int, h: int, w: int) -> Triple:
    """The tile of a (t, h, w) grid: a pure function of the grid.

    Among the tiles of at most 4 blocks whose `tile_efficiency` is within reach of the best (0.92
    is enough), the one nearest to (6, 8, 8) for a video or (1, 16, 16) for an image, where more
    efficiency makes up for some distance. A grid of at most 3 blocks is one tile.
    """
    if t * h * w <= _ONE_TILE:
        return t, h, w
    grid = np.asarray([[t], [h], [w]])
    tiles = _candidates()
    a, b, c = tiles[:, (tiles <= grid).all(axis=0)]
    efficiency = _tile_efficiency((t, h, w), a, b, c, QUERY_BLOCK)
    prefer_t = min(t, _PREFERRED_T)
    side = max(_PREFERRED_SIDE, _PREFERRED_IMAGE_SIDE / prefer_t**0.5)
    # Distances in log2, so that twice too long costs as much as twice too short.
    distance = (
        np.abs(np.log2(a / prefer_t))
        + np.abs(np.log2(b / min(h, side)))
        + np.abs(np.log2(c / min(w, side)))
    )
    cost = distance + _EFFICIENCY_WEIGHT * (1.0 - efficiency)
    cost = np.where(efficiency >= min(_ENOUGH, float(efficiency.max())), cost, np.inf)
    # Rounded, so that equal costs are equal on every machine; ties go to the longer tile along w.
    best = np.lexsort((-c, np.round(cost, 6)))[0]
    return int(a[best]), int(b[best]), int(c[best])


def tile_start(grid: Triple, tile: Triple, index: Triple) -> int:
    """Offset, in the part, of the first token of tile `index`."""
    (t, h, w), (a, b, c), (i, j, k) = grid, tile, index
    ta = min(a, t - i * a)
    tb = min(b, h - j * b)
    return i * a * h * w + ta * j * b * w + ta * tb * k * c


@lru_cache(maxsize=64)
def tile_order(grid: Triple, tile: Triple) -> npt.NDArray[np.int32]:
    """Raster index of the token stored at each place, int32 `[t*h*w]` (read-only)."""
    extents = []
    for n, size in zip(grid, tile, strict=True):
        x = np.arange(n, dtype=np.int32)
        start = x // size * size
        extents.append((start, np.minimum(size, n - start), x - start))
    (t0, ta, dt), (h0, tb, dh), (w0, tc, dw) = extents
    _, h, w = grid
    along_t, along_h = np.s_[:, None, None], np.s_[:, None]
    row = (t0 * h * w)[along_t] + ta[along_t] * (h0 * w)[along_h]
    column = ta[along_t] * tb[along_h] * w0
    inside = (dt[along_t] * tb[along_h] + dh[along_h]) * tc + dw
    place = row + column + inside
    order = np.empty(place.size, np.int32)
    order[place.ravel()] = np.arange(place.size, dtype=np.int32)
    order.flags.writeable = False
    return order
