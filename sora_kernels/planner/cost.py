"""What the ranks balance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Int64Array, check_int

_MAX_TOTAL = 2**62


@dataclass(frozen=True)
class Cost:
    """Cost of a clip of n tokens: `n * (linear + pair * min(n, max_keys))`, an integer.

    A DiT block of width D (MLP ratio 4) spends `24 D^2` FLOPs per token in its projections and
    `4 D` per token and key in attention, so `linear = 6 D, pair = 1` is its cost over `4 D`.

    Attributes:
        linear: cost per token.
        pair: cost per token and key it attends to; 0 balances tokens alone.
        max_keys: keys that a token sees at most (sliding window attention); None = the whole clip.
    """

    linear: int = 6 * 1152
    pair: int = 1
    max_keys: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("linear", 1), ("pair", 0)):
            check_int(f"cost.{name}", getattr(self, name), minimum)
        if self.max_keys is not None:
            check_int("cost.max_keys", self.max_keys, 1)

    @classmethod
    def of_width(cls, width: int, max_keys: int | None = None) -> Cost:
        """The cost of a DiT of hidden size `width`."""
        return cls(6 * check_int("width", width, 1), 1, max_keys)

    def of(self, lengths: Int64Array) -> Int64Array:
        """Cost of each clip, int64.

        Raises:
            ValueError: the total does not fit into 62 bits.
        """
        keys = lengths if self.max_keys is None else np.minimum(lengths, self.max_keys)
        total = (lengths * (self.linear + self.pair * keys.astype(np.float64))).sum()
        if total >= _MAX_TOTAL:
            raise ValueError(f"cost: expected a total below 2**62, got {total:.3g}")
        return lengths * (self.linear + self.pair * keys)
