"""Raw ops of ``qk_norm_rope``: schemas, codes and shapes that all implementations share.

One raw op serves every layout. Its tensors come in *streams* (text and video of a joint model):

    no index         one stream; token n of the input is token n of the result
    one q, G index   G groups of tokens of one packed q and k, each with weights of its own
    G q, G index     G tensors whose tokens go to the rows index[s] of one packed result
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ... import backend

OP = "qk_norm_rope"


class Norm(IntEnum):
    NONE = 0
    RMS = 1
    LAYER = 2
    RMS_FULL = 3


class Pairing(IntEnum):
    INTERLEAVED = 0
    HALF = 1
    HALF_PER_AXIS = 2


#: The lists of tensors that the raw ops take, in order; ``needs`` and the gradients follow it.
LISTS = ("q", "k", "v", "q_weight", "k_weight", "q_bias", "k_bias")


#: Tables of a call: cos, sin, positions, parts of q, then of k; then part_size and first_token of q
#: and of k. ``positions`` is int32 ``[N, A]``, a row of cos and sin per token and axis, without
#: ``parts``; or ``[N]``, the part of each token, whose rows follow from its grid in ``parts``:
#: ``packing.rope.GridPositions`` says what the last three are.
TABLE_TENSORS, TABLES = 8, 12


def split(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """A flat sequence cut into lists of the given sizes."""
    result, start = [], 0
    for size in sizes:
        result.append(list(flat[start : start + size]))
        start += size
    return result


def new_outputs(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised q', k', v'; without v the last has no elements."""
    result = []
    for x in (q, k, v):
        if not x:
            result.append(q[0].new_empty((0,)))
        elif len(x) == 1:
            result.append(x[0].new_empty(x[0].shape))
        else:
            result.append(x[0].new_empty((tokens, *x[0].shape[-2:])))
    return result[0], result[1], result[2]


def new_gradients(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    parameters: Sequence[Sequence[Tensor]],
    needs: Sequence[int],
) -> list[Tensor]:
    """Uninitialised gradients in the order of LISTS; those that are not needed have no elements.

    Gradients of weights and biases are fp32 here; autograd gets them in the parameter's dtype.
    """
    out = []
    for i, x in enumerate((*q, *k, *v)):
        out.append(x.new_empty(x.shape if needs[i] else (0,)))
    for i, p in enumerate((p for group in parameters for p in group), start=len(out)):
        out.append(p.new_empty(p.shape if needs[i] else (0,), dtype=torch.float32))
    return out


# --- schemas and shapes -------------------------------------------------------------------------

# Lists that may be empty are optional, because AOTInductor passes None for an empty list.
_INPUTS = (
    "Tensor[] q, Tensor[] k, Tensor[]? v, Tensor[]? q_weight, Tensor[]? k_weight, "
    "Tensor[]? q_bias, Tensor[]? k_bias, Tensor[]? index, SymInt tokens, Tensor? cos, Tensor? sin, "
    "Tensor? positions, Tensor? parts, Tensor? k_cos, Tensor? k_sin, Tensor? k_positions, "
    "Tensor? k_parts, int part_size, SymInt first_token, int k_part_size, SymInt k_first_token, "
    "int[] axes, int norm, float eps, int pairing, int law"
)


def _fake_fwd(q: Any, k: Any, v: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_outputs(q, k, v, args[5])


def _fake_bwd(dyq: Any, dyk: Any, dyv: Any, q: Any, k: Any, v: Any, *args: Any) -> list[Tensor]:
    return new_gradients(q, k, v, args[:4], args[-1])


backend.register(
    OP,
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    f"(Tensor? dyq, Tensor? dyk, Tensor? dyv, {_INPUTS}, int[] needs) -> Tensor[]",
    _fake_fwd,
    _fake_bwd,
    cuda=True,
)
