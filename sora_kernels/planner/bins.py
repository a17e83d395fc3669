"""Bin packing: best fit, and the bound that no plan can beat."""

from __future__ import annotations

import bisect
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import _ext
from .arrays import Int64Array, offsets_of

Implementation: TypeAlias = Literal["native", "numpy"]


def lower_bound(lengths: npt.ArrayLike, capacity: int, world: int = 1) -> int:
    """Packs that any plan needs: max(ceil(sum / capacity), L2), up to a multiple of `world`.

    L2 is the bound of Martello and Toth (Discrete Applied Mathematics 28, 1990): for a threshold p,
    clips above capacity - p are alone, those above capacity / 2 need a pack each, and clips in
    [p, capacity / 2] that do not fit beside the latter need more.
    """
    s = np.sort(np.asarray(lengths, np.int64))
    if s.size == 0:
        return 0
    total = offsets_of(s)
    half = np.searchsorted(s, capacity // 2, side="right")
    p = np.concatenate([np.zeros(1, np.int64), np.unique(s[:half])])
    first = np.searchsorted(s, p, side="left")
    alone = np.searchsorted(s, capacity - p, side="right")
    large = alone - half
    room = large * capacity - (total[alone] - total[half])
    rest = np.maximum(total[half] - total[first] - room, 0)
    l2 = (s.size - alone) + large + -(-rest // capacity)
    bound = max(int(l2.max()), -(-int(total[-1]) // capacity))
    return -(-bound // world) * world


def choose_native(implementation: Implementation | None) -> bool:
    """Whether to use C++."""
    if implementation not in (None, "native", "numpy"):
        raise ValueError(
            f'implementation: expected "native", "numpy" or None, got {implementation!r}'
        )
    if implementation == "native" and _ext.host is None:
        raise RuntimeError(f"implementation: native is not available: {_ext.missing['_host']}")
    return implementation != "numpy" and _ext.host is not None


def best_fit(lengths: Int64Array, capacity: int, native: bool) -> Int64Array:
    """Pack of each clip: the fullest that still has room, the oldest of equals, else a new one."""
    if native:
        assert _ext.host is not None
        return _ext.host.best_fit(lengths, capacity)
    packs = np.empty(lengths.size, np.int64)
    # Open packs as sorted (room, number) pairs; a full pack can never take a clip again.
    rooms: list[tuple[int, int]] = []
    count = 0
    for i, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, pack = rooms.pop(at)
        else:
            room, pack, count = capacity, count, count + 1
        packs[i] = pack
        if room > length:
            bisect.insort(rooms, (room - length, pack))
    return packs
