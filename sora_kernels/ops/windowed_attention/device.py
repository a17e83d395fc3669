"""Which rows a block of windowed attention reads, by integer arithmetic on the device.

`plan` turns one row of the segment table, the tile of a block and the window into some twenty
integers; `block_at` finds the rows of the x-th block of the other side from these alone, so the
loops of the kernels have no load in their index chain and are one pipeline over all ranges.
`sora_kernels.packing.windows` says the same in plain Python (`seen_ranges`, `seeing_ranges`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_span(index, count, back, ahead, clamp, INVERSE: tl.constexpr):
    """Tiles [low, high) of an axis that tile `index` sees, or (INVERSE) that see it."""
    size = back + ahead + 1
    if INVERSE:
        # A clamped window that starts at the first tile reaches tile size - 1, one that ends at
        # the last tile begins at tile count - size: all tiles up to there see these.
        low = tl.maximum(index - ahead, 0)
        high = tl.minimum(index + back + 1, count)
        low = tl.where((clamp != 0) & (index < size), 0, low)
        high = tl.where((clamp != 0) & (index >= count - size), count, high)
    else:
        low = tl.maximum(index - back, 0)
        high = tl.minimum(index + ahead + 1, count)
        moved = tl.minimum(low, tl.maximum(count - size, 0))
        low = tl.where(clamp != 0, moved, low)
        high = tl.where(clamp != 0, tl.minimum(moved + size, count), high)
    return low, high


@triton.jit
def plan(
    table_ptr, segment, tile, length, back_t, back_h, back_w, ahead_t, ahead_h, ahead_w, clamp,
    causal, sink, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(blocks to read, what `block_at` needs) for the rows of `tile` of `segment`.

    The ranges, in order: A before the main grid, B after it, C whole layers of tiles (the sink;
    INVERSE: those that see a layer of the sink), D the w-runs of the window outside them, `runs`
    of them in each of `layers` layers. Only the last layer and the last run of a layer may be
    shorter. Runs of a window as wide as the grid touch: they become one per layer, and layers as
    high as the grid become one run in all.
    """
    row = table_ptr + 8 * segment
    start = tl.load(row)
    t, h, w = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    a = tl.maximum(tl.load(row + 4), 1)
    b = tl.maximum(tl.load(row + 5), 1)
    c = tl.maximum(tl.load(row + 6), 1)
    stop = start + t * h * w
    outside = tile < 0

    # The window, in tiles.
    count_t, count_h, count_w = tl.cdiv(t, a), tl.cdiv(h, b), tl.cdiv(w, c)
    number = tl.maximum(tile, 0)
    at_w = number % tl.maximum(count_w, 1)
    at_th = number // tl.maximum(count_w, 1)
    at_h = at_th % tl.maximum(count_h, 1)
    at_t = at_th // tl.maximum(count_h, 1)
    clamp_t = tl.where(causal != 0, 0, clamp)
    low_t, high_t = tile_span(at_t, count_t, back_t, ahead_t, clamp_t, INVERSE)
    low_h, high_h = tile_span(at_h, count_h, back_h, ahead_h, clamp, INVERSE)
    low_w, high_w = tile_span(at_w, count_w, back_w, ahead_w, clamp, INVERSE)

    # A, B and C: first row and end of each.
    if INVERSE:
        end_a = tl.where(outside, length, tl.where(causal != 0, 0, start))
        begin_b = tl.where(outside | (causal != 0), length, stop)
        sunk = at_t < sink
        begin_c = start + tl.where(sunk, tl.where(causal != 0, at_t * a, 0), t) * h * w
        end_c = stop
        high_t = tl.where(sunk, low_t, high_t)
    else:
        end_a = tl.where(outside & (causal == 0), length, start)
        begin_b = tl.where(outside & (causal == 0), length, stop)
        depth_c = tl.minimum(sink, tl.where(causal != 0, at_t + 1, count_t))
        begin_c = start
        end_c = start + tl.minimum(depth_c * a, t) * h * w
        low_t = tl.maximum(low_t, depth_c)
    end_c = tl.where(outside, begin_c, end_c)
    blocks_a = tl.cdiv(end_a, BLOCK)
    blocks_b = blocks_a + tl.cdiv(length - begin_b, BLOCK)
    blocks_c = blocks_b + tl.cdiv(end_c - begin_c, BLOCK)

    # D, in tokens. Tile (i, j, k) starts at i*a*h*w + ta*j*b*w + ta*tb*k*c, where ta and tb are
    # the extents that it has.
    first = start + low_t * a * h * w
    across = low_h * b * w
    along = low_w * c
    width = tl.minimum(high_w * c, w) - along
    height = tl.minimum(high_h * b, h) - low_h * b
    depth = tl.minimum(high_t * a, t) - low_t * a
    wide = width == w
    whole = wide & (height == h)
    layers = tl.where(whole, 1, high_t - low_t)
    runs = tl.where(wide, 1, high_h - low_h)
    extent_t = tl.where(whole, depth, a)
    extent_h = tl.where(wide, height, b)
    last_t = tl.where(whole, depth, depth - (layers - 1) * a)
    last_h = tl.where(wide, height, height - (runs - 1) * b)
    per_run = tl.cdiv(extent_t * extent_h * width, BLOCK)
    per_layer = (runs - 1) * per_run + tl.cdiv(extent_t * last_h * width, BLOCK)
    per_last_run = tl.cdiv(last_t * extent_h * width, BLOCK)
    per_last_layer = (runs - 1) * per_last_run + tl.cdiv(last_t * last_h * width, BLOCK)
    empty = outside | (high_t <= low_t)
    blocks = blocks_c + tl.where(empty, 0, (layers - 1) * per_layer + per_last_layer)
    return blocks, (
        blocks_a, blocks_b, blocks_c, end_a, begin_b - blocks_a * BLOCK, length,
        begin_c - blocks_b * BLOCK, end_c, first, a * h * w, across, b * w, along, width,
        layers - 1, runs - 1, extent_t, extent_h, last_t, last_h, tl.maximum(per_layer, 1),
    )  # fmt: skip


@triton.jit
def block_at(x, where, BLOCK: tl.constexpr):
    """First row of block x, counted from the segment's first, and the rows left in its range.

    A short last layer has no more blocks than the others, so dividing by those of a whole layer
    finds it too; so it is with the last run of a layer.
    """
    (
        blocks_a, blocks_b, blocks_c, end_a, shift_b, end_b, shift_c, end_c, first, layer_step,
        across, run_step, along, width, last_layer, last_run, extent_t, extent_h, last_t, last_h,
        per_layer,
    ) = where  # fmt: skip
    y = tl.maximum(x - blocks_c, 0)
    i = y // per_layer
    y -= i * per_layer
    ta = tl.where(i == last_layer, last_t, extent_t)
    per = tl.maximum(tl.cdiv(ta * extent_h * width, BLOCK), 1)
    j = y // per
    tb = tl.where(j == last_run, last_h, extent_h)
    begin = first + i * layer_step + ta * (across + j * run_step + tb * along)
    end = begin + ta * tb * width
    row = begin + (y - j * per) * BLOCK

    # The other three are contiguous, so their rows are a shift away from x * BLOCK.
    shift = tl.where(x < blocks_b, shift_b, shift_c)
    last = tl.where(x < blocks_b, end_b, end_c)
    shift = tl.where(x < blocks_a, 0, shift)
    last = tl.where(x < blocks_a, end_a, last)
    row = tl.where(x < blocks_c, x * BLOCK + shift, row)
    end = tl.where(x < blocks_c, last, end)
    return row, end - row
