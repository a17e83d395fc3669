"""Norm and 3-D rotary embedding of queries and keys in one pass, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import backend, laws
from . import checks
from .raw import LISTS, OP, TABLE_TENSORS, TABLES, Norm, Pairing, split
from .reference import qk_norm_rope_reference

if TYPE_CHECKING:
    from ...packing import Rope

__all__ = ["joint_index", "qk_norm_rope", "qk_norm_rope_joint"]

_NORMS = {None: Norm.NONE, "rms": Norm.RMS, "layer": Norm.LAYER, "rms_full": Norm.RMS_FULL}
_PAIRINGS = {p.name.lower(): p for p in Pairing}

Parameter = Tensor | Sequence[Tensor]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Parameter | None = None,
    k_weight: Parameter | None = None,
    rope: Rope | None = None,
    *,
    k_rope: Rope | None = None,
    q_bias: Parameter | None = None,
    k_bias: Parameter | None = None,
    groups: Sequence[Tensor] | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    law: laws.Law = "fp32_once",
) -> tuple[Tensor, Tensor]:
    """Normalises each head of q and k, then rotates it by its token's position.

    The norm is RMSNorm or LayerNorm over the D components of a head, or RMSNorm over all heads of
    a token (``rms_full``: Wan, LTX). The rotation turns the pair (a, b) by the angle of its token::

        a' = a cos - b sin        b' = b cos + a sin

    with angles read from the per-axis table of ``rope`` (RoFormer, arXiv:2104.09864, one axis per
    slice of the head). ``reference.py`` holds the definition in plain PyTorch. Text tokens sit at
    position 0 of every axis and are not turned. q and k may be views of one packed QKV projection
    (``qkv.unbind(1)`` of ``[N, 3, H, D]``); nothing is copied.

    Args:
        q: ``[N, Hq, D]`` packed or ``[B, L, Hq, D]`` dense; fp32, bf16, fp16 (fp64: reference).
            Any strides with ``stride(-1) == 1``. D is even.
        k: the same with Hk heads; its own number of tokens is allowed if ``rope`` is None or
            ``k_rope`` is given.
        q_weight: scale of the norm, ``[D]``, or ``[Hq * D]`` for ``rms_full``; any float dtype.
        k_weight: the same for k.
        rope: tables and positions, of N (dense: L, or B * L) tokens; those of ``layout.rope`` are
            computed in the kernel from the part grids. The first r components of a
            head are rotated, r = ``sum(rope.axes)``, the rest pass through. ``cos`` and ``sin``
            are ``[P, r/2]``, or ``[P, H, r/2]`` for angles that differ per head (Mochi, LTX).
            None: norm only.
        k_rope: tables of k, if they are not those of q (LTX-2); same axes, own values and length.
        q_bias: bias of the LayerNorm, ``[D]``; only with ``norm="layer"``.
        k_bias: the same for k.
        groups: token numbers, int64, of G groups that together hold every token once, e.g.
            ``(layout.text_tokens, layout.grid_tokens)``. Each weight and bias is then a sequence
            of G tensors (or ``[G, D]``): joint models norm text and video by weights of their own.
        norm: ``"rms"``, ``"layer"``, ``"rms_full"`` or None.
        eps: added to the mean square (variance).
        pairing: which components form a pair: ``"interleaved"`` (2j, 2j+1), ``"half"`` (j, j+r/2),
            ``"half_per_axis"`` (halves of each axis' own slice).
        law: rounding law; the points xhat, affine, pre_rope and rope apply (``sora_kernels.laws``).

    Returns:
        q', k': contiguous, in the shapes and dtype of q and k.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    checks.check_pair(q, k, groups is not None or (rope is not None and k_rope is None))
    index = [] if groups is None else list(groups)
    if groups is not None:
        checks.check_index("groups", index, q.shape[:-2].numel(), q)
    count = None if groups is None else len(index)
    lists = {
        "q": [q],
        "k": [k],
        "v": [],
        "q_weight": checks.parameters("q_weight", q_weight, q, norm, count),
        "k_weight": checks.parameters("k_weight", k_weight, k, norm, count),
        "q_bias": checks.parameters("q_bias", q_bias, q, norm, count),
        "k_bias": checks.parameters("k_bias", k_bias, k, norm, count),
    }
    tables = _tables(q, k, q.shape[:-2], k.shape[:-2], rope, k_rope)
    yq, yk, _ = _run(lists, index, 0, tables, rope, k_rope, norm, eps, pairing, law)
    return yq, yk


def qk_norm_rope_joint(
    streams: Sequence[Sequence[Tensor]],
    q_weight: Parameter | None = None,
    k_weight: Parameter | None = None,
    rope: Rope | None = None,
    *,
    index: Sequence[Tensor] | None = None,
    k_rope: Rope | None = None,
    q_bias: Parameter | None = None,
    k_bias: Parameter | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    law: laws.Law = "fp32_once",
) -> tuple[Tensor, ...]:
    """:func:`qk_norm_rope` of separate text and video tensors, written into one packed q and k.

    Joint models (HunyuanVideo, Flux, SD3, CogVideoX, Mochi) project text and video apart, norm
    them with weights of their own, concatenate and rotate. Here each token is written to its row
    of the joint sequence at once; v, if given, is copied there. There is no concatenation, and the
    backward reads the joint gradient where it is.

    Args:
        streams: ``(q, k)`` or ``(q, k, v)`` for each of two or more streams, such as text and
            video, each ``[n, H, D]`` packed or ``[B, l, H, D]`` dense, as in ``qk_norm_rope``.
        q_weight, k_weight, q_bias, k_bias: one tensor for each stream (or ``[G, D]``), or None.
        rope: tables of the joint sequence of N (dense: L, or B * L) tokens, in its order.
        index: where the tokens of each stream go, int64, e.g. ``(layout.text_tokens,
            layout.grid_tokens)``; together every row once. None: one stream after the other
            (within each sample), ``joint_index``; build that once per batch and pass it.
        k_rope, norm, eps, pairing, law: as in ``qk_norm_rope``.

    Returns:
        q', k' (and v'): contiguous ``[N, H, D]``, or ``[B, L, H, D]`` for dense streams.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    parts = [tuple(stream) for stream in streams]
    if len(parts) < 2 or len({len(p) for p in parts}) != 1 or len(parts[0]) not in (2, 3):
        raise ValueError(
            "streams: expected at least two of (q, k), or of (q, k, v), got tuples of "
            f"{[len(p) for p in parts]}"
        )
    lists: dict[str, list[Tensor]] = {
        name: [p[i] for p in parts] if i < len(parts[0]) else [] for i, name in enumerate("qkv")
    }
    first = parts[0][0]
    for s, part in enumerate(parts):
        for i, name in enumerate("qkv"[: len(part)]):
            checks.check_pair(part[0], part[i], True, (f"streams[{s}].q", f"streams[{s}].{name}"))
            like = parts[0][i]
            if part[i].ndim != like.ndim or part[i].shape[-2:] != like.shape[-2:]:
                raise ValueError(
                    f"streams[{s}].{name}: expected heads like {tuple(like.shape)}, "
                    f"got {tuple(part[i].shape)}"
                )
            if part[i].dtype != first.dtype or part[i].device != first.device:
                raise TypeError(
                    f"streams[{s}].{name}: expected {first.dtype} on {first.device}, "
                    f"got {part[i].dtype} on {part[i].device}"
                )
        if first.ndim == 4 and part[0].shape[0] != first.shape[0]:
            raise ValueError(f"streams[{s}].q: expected batch {first.shape[0]}")
    lengths = [p[0].shape[-3] for p in parts]
    batch = first.shape[0] if first.ndim == 4 else 1
    if index is None:
        index = joint_index(lengths, batch, device=first.device)
    if len(index) != len(parts):
        raise ValueError(f"index: expected one for each of {len(parts)} streams, got {len(index)}")
    checks.check_index("index", index, [batch * n for n in lengths], first)
    outer = (batch, sum(lengths)) if first.ndim == 4 else (sum(lengths),)
    tables = _tables(first, parts[0][1], outer, outer, rope, k_rope)
    for name, given in (("q_weight", q_weight), ("k_weight", k_weight),
                        ("q_bias", q_bias), ("k_bias", k_bias)):  # fmt: skip
        lists[name] = checks.parameters(name, given, lists[name[0]][0], norm, len(parts))
    results = _run(
        lists, list(index), batch * sum(lengths), tables, rope, k_rope, norm, eps, pairing, law
    )
    return tuple(y.view(*outer, *y.shape[-2:]) for y in results[: len(parts[0])])


def joint_index(
    lengths: Sequence[int], batch: int = 1, *, device: torch.device | str | None = None
) -> tuple[Tensor, ...]:
    """Rows of streams that follow each other within each of B samples: int64 ``[B * l]`` each."""
    total = sum(lengths)
    starts = torch.arange(batch, device=device)[:, None] * total
    result, before = [], 0
    for length in lengths:
        rows = starts + torch.arange(before, before + length, device=device)
        result.append(rows.flatten())
        before += length
    return tuple(result)


# --- one way for both ---------------------------------------------------------------------------

_Tables = list[Any]  # raw.TABLES


def _tables(
    q: Tensor,
    k: Tensor,
    q_outer: Sequence[int],
    k_outer: Sequence[int],
    rope: Rope | None,
    k_rope: Rope | None,
) -> _Tables:
    if rope is None:
        if k_rope is not None:
            raise ValueError("k_rope: expected None without rope, got tables")
        return [None] * TABLE_TENSORS + [0] * 4
    checks.check_rope("rope", rope, q, q_outer)
    if k_rope is None:
        checks.check_heads("rope", rope.cos, k)
        tables, place = _side(rope)
        return [*tables, *tables, *place, *place]
    checks.check_rope("k_rope", k_rope, k, k_outer)
    checks.check_k_rope(k_rope, rope)
    tables, place = _side(rope)
    k_tables, k_place = _side(k_rope)
    if (tables[3] is None) != (k_tables[3] is None):  # one kernel turns both: index them both
        tables, k_tables = ([r.cos, r.sin, r.position_index, None] for r in (rope, k_rope))
    return [*tables, *k_tables, *place, *k_place]


def _side(rope: Rope) -> tuple[list[Tensor | None], tuple[int, int]]:
    """Tables of q or k; part_size and first_token."""
    at = rope.positions
    if isinstance(at, Tensor):
        return [rope.cos, rope.sin, at, None], (0, 0)
    return [rope.cos, rope.sin, at.part_of_token, at.parts], (at.part_size, at.first_token)


def _run(
    lists: dict[str, list[Tensor]],
    index: list[Tensor],
    tokens: int,
    tables: _Tables,
    rope: Rope | None,
    k_rope: Rope | None,
    norm: str | None,
    eps: float,
    pairing: str,
    law: laws.Law,
) -> tuple[Tensor, Tensor, Tensor]:
    norm_code = checks.lookup("norm", norm, _NORMS)
    pairing_code = checks.lookup("pairing", pairing, _PAIRINGS)
    mask = laws.resolve(law)
    axes = [] if rope is None else list(rope.axes)
    q = lists["q"][0]
    chosen = backend.choose(OP, q)
    if chosen == "reference":
        options: dict[str, Any] = {
            "norm": norm,
            "eps": eps,
            "pairing": pairing,
            "points": _point_names(mask),
        }
        sides = []
        for side, table in (("q", rope), ("k", k_rope or rope)):
            sides.append(
                qk_norm_rope_reference(
                    lists[side],
                    lists[f"{side}_weight"],
                    lists[f"{side}_bias"],
                    index,
                    tokens,
                    None if table is None else (table.cos, table.sin, table.position_index),
                    tuple(axes),
                    **options,
                )  # fmt: skip
            )
        v = q.new_empty(0)
        if lists["v"]:
            v = qk_norm_rope_reference(lists["v"], index=index, tokens=tokens, norm=None)
        return sides[0], sides[1], v
    flat = [t for name in LISTS for t in lists[name]]
    sizes = [len(lists[name]) for name in LISTS]
    rest = (tokens, *tables, axes, norm_code, float(eps), pairing_code, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
        if torch.compiler.is_compiling():
            flat = _distinct(flat)
        return _QkNormRope.apply(chosen, sizes, len(index), rest, *flat, *index)
    forward = backend.implementation(OP, "fwd", chosen, q)
    return forward(*split(flat, sizes), index, *rest)


def _point_names(mask: int) -> frozenset[str]:
    return frozenset(p.name.lower() for p in laws.Point if p.name and p & mask)


class _QkNormRope(torch.autograd.Function):
    """Saves its inputs only: the statistics are recomputed from the row that is read anyway."""

    @staticmethod
    def forward(
        ctx: Any, chosen: str, sizes: list[int], groups: int, rest: Any, *flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors, index = list(flat[: sum(sizes)]), list(flat[sum(sizes) :])
        ctx.chosen, ctx.sizes, ctx.statics = chosen, sizes, (rest[0], rest[1 + TABLE_TENSORS :])
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        # A rotation alone needs no input to go back: shape and dtype are those of the gradient.
        ctx.rotation = rest[2 + TABLES] == Norm.NONE and not groups
        saved = tensors[2:] if ctx.rotation else tensors
        ctx.save_for_backward(*saved, *index, *rest[1 : 1 + TABLE_TENSORS])
        forward = backend.implementation(OP, "fwd", chosen, tensors[0])
        return forward(*split(tensors, sizes), index, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dys = [None if g is None else _dense(g) for g in grads]
        everything = list(ctx.saved_tensors)  # once: gradient checkpointing forbids a second time
        saved, tables = everything[:-TABLE_TENSORS], everything[-TABLE_TENSORS:]
        if ctx.rotation:
            stand_in = [dy for dy in dys[:2] if dy is not None]
            if not stand_in:
                return (None,) * (4 + len(ctx.dtypes))
            saved = [stand_in[0], stand_in[-1], *saved]
        count = len(ctx.dtypes)
        lists, index = split(saved[:count], ctx.sizes), saved[count:]
        of = [LISTS[i][0] for i, size in enumerate(ctx.sizes) for _ in range(size)]  # q, k or v
        needs = [
            int(want and dys["qkv".index(side)] is not None)
            for side, want in zip(of, ctx.needs_input_grad[4:], strict=False)
        ]
        out: list[Tensor | None] = [None] * count
        if any(needs):
            tokens, statics = ctx.statics
            run = backend.implementation(OP, "bwd", ctx.chosen, saved[0])
            computed = run(*dys, *lists, index, tokens, *tables, *statics, needs)
            for i, dtype in enumerate(ctx.dtypes):
                if needs[i]:
                    out[i] = computed[i].to(dtype)
        return None, None, None, None, *out, *([None] * len(index))


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Views for repetitions: torch.compile refuses one tensor for two inputs of a Function."""
    seen: list[Tensor] = []
    for t in tensors:
        seen.append(t.view_as(t) if any(t is other for other in seen) else t)
    return seen


def _dense(grad: Tensor) -> Tensor:
    """Kernels take any outer strides, but rows of stride 1 (a sum's gradient has stride 0)."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()
