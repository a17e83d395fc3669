"""Checked inputs, prefix sums and keyed random order."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]

MASK = 2**64 - 1


def check_lengths(lengths: npt.ArrayLike, capacity: int, first: int = 0) -> Int64Array:
    """`lengths` as int64 `[n]`, each in [1, capacity]; errors count clips from `first`."""
    capacity = check_int("capacity", capacity, 1)
    array = np.asarray(lengths)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"lengths: expected integers [n], got {array.dtype} {list(array.shape)}")
    bad = np.flatnonzero((array < 1) | (array > capacity))
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"lengths[{first + i}]: expected 1 to {capacity} tokens (the capacity), got {array[i]}"
        )
    return array.astype(np.int64)


def check_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return int(value)


def sums(values: Int64Array, offsets: Int64Array) -> Int64Array:
    total = offsets_of(values)
    return total[offsets[1:]] - total[offsets[:-1]]


def offsets_of(counts: Int64Array) -> Int64Array:
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def keys(seed: int, epoch: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Random uint64 keys `[count]`, a pure function of the arguments: SplitMix64 of a counter."""
    start = mix(mix(mix(seed & MASK) ^ (epoch & MASK)) ^ stream)
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
