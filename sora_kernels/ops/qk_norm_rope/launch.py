"""What the launchers of ``qk_norm_rope`` share: one side (q or k) of one pass, and constants."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from typing import Any

from torch import Tensor

from ...laws import Point
from .checks import MAX_AXES
from .raw import TABLE_TENSORS

POINTS = int(Point.XHAT | Point.AFFINE | Point.PRE_ROPE | Point.ROPE)

# Arguments that change with every pack: what they are divisible by must not make another kernel.
SIZES = ("first_block n_q n_k q_len k_len dyq_len dyk_len rope_len part_size first k_rope_len "
         "k_part_size k_first").split()  # fmt: skip

Strides = tuple[int, int, int]
SideTables = tuple[Tensor | None, ...]  # cos, sin, positions, parts: see ``raw.TABLES``


@dataclass
class Side:
    """q or k of one pass: its tokens, and where results go. ``y`` is dx in a backward."""

    x: Tensor  # [N, H, D] or [B, L, H, D]
    tokens: int  # of the pass
    weight: Tensor | None = None
    bias: Tensor | None = None
    tables: SideTables = (None,) * 4
    part_size: int = 0
    first_token: int = 0
    y: Tensor | None = None
    dy: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.x.shape[-2]

    @property
    def length(self) -> int | None:
        return length_of(self.x)

    @property
    def strides(self) -> Strides:
        return strides_of(self.x)

    @property
    def rope_sizes(self) -> tuple[int, int, int]:
        """Tokens of the tables (at least 1: a divisor), values of a part, first token."""
        positions = self.tables[2]
        length = 1 if positions is None else max(1, positions.shape[0])
        return length, self.part_size, self.first_token

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which of dx, dweight and dbias."""
        return self.y is not None, self.dweight is not None, self.dbias is not None


def side_tables(tables: Any, side: int) -> tuple[SideTables, int, int]:
    """The tables, part_size and first_token of q (0) or k (1)."""
    at = TABLE_TENSORS + 2 * side
    return tables[4 * side : 4 * side + 4], tables[at], tables[at + 1]


def length_of(x: Tensor) -> int | None:
    """Tokens per batch entry, at least 1: a divisor; None if there is one entry only."""
    return max(1, x.shape[-3]) if x.ndim == 4 and x.shape[0] != 1 else None


def strides_of(x: Tensor) -> Strides:
    return (0, x.stride(0), x.stride(1)) if x.ndim == 3 else (x.stride(0), x.stride(1), x.stride(2))


def unit_of(*strides: Strides) -> int:
    """Largest common power of two of the strides, up to 16.

    Triton knows that an argument is a multiple of 16 but not of 8, which a head of 72 bf16
    components needs for 16-byte accesses; so strides travel divided by this.
    """
    return gcd(16, *(s for group in strides for s in group))


def rope_constants(axes: list[int], tables: SideTables) -> dict[str, Any]:
    cos, _, positions, _ = tables
    ends = list(accumulate(size // 2 for size in axes)) or [0]
    ends += [ends[-1]] * (MAX_AXES - len(ends))
    return {
        "B1": ends[0],
        "B2": ends[1],
        "B3": ends[2],
        "R2": ends[3],
        "NUM_POS": 0 if positions is None or positions.ndim == 1 else positions.shape[1],
        "PER_HEAD": cos is not None and cos.ndim == 3,
    }
