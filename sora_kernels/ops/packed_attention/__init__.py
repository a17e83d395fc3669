"""Attention inside each segment of a packed sequence: `packed_attention` and `merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference import packed_attention_reference

if TYPE_CHECKING:
    from ...packing import PackedLayout

__all__ = ["merge", "packed_attention", "packed_attention_reference"]

MAX_HEAD_DIM = 256
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to the tokens of its own segment.

    Self-attention takes the segments from `layout` or from `cu_seqlens`. Cross-attention adds
    `cu_seqlens_k`: segment i of the queries then reads segment i of the keys.

    Args:
        q: `[N, H, D]`, D <= 256; may be a strided view (`stride(-1) == 1`), as of a packed QKV.
        k, v: `[Nk, Hk, D]`; Hk divides H (grouped or multi-query attention).
        layout: the pack; its lengths are known on the host, so nothing ever waits for the device.
        cu_seqlens: int32 `[S + 1]` on the device of `q`: 0, and the running sum of the lengths.
            Segments may be empty.
        max_seqlen: the longest segment (an upper bound will do); never read from the device.
        softmax_scale: default `D ** -0.5`.
        causal: query i of a segment sees the keys j <= i + (len_k - len_q) (bottom-right aligned).
        return_lse: also return the natural-log LSE, fp32 `[H, N]`, differentiable.

    Returns:
        out `[N, H, D]` in the dtype of q, and with `return_lse` also lse. A query that sees no
        key gets out = 0 and lse = -inf.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_qkv(q, k, v)
    if layout is not None:
        if cu_seqlens is not None:
            raise ValueError("packed_attention: expected layout or cu_seqlens, got both")
        cu_seqlens, max_seqlen = layout.cu_seqlens, layout.max_seqlen
        if layout.num_tokens != q.shape[0]:
            raise ValueError(
                f"packed_attention: layout has {layout.num_tokens} tokens, q has {q.shape[0]}"
            )
    elif cu_seqlens is None:
        raise ValueError("packed_attention: expected layout or cu_seqlens, got neither")
    _check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"packed_attention: k has {k.shape[0]} tokens and q {q.shape[0]}; "
                "expected cu_seqlens_k for cross-attention, got None"
            )
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    else:
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"packed_attention: cu_seqlens_k has {cu_seqlens_k.shape[0] - 1} segments, "
                f"cu_seqlens {cu_seqlens.shape[0] - 1}"
            )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    lens_q = _host_lengths("cu_seqlens", cu_seqlens, q.shape[0])
    lens_k = _host_lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out, lse = packed_attention_reference(q, k, v, lens_q, lens_k, scale, causal)
    return (out, lse.float()) if return_lse else out


def merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention of the same queries over two disjoint sets of keys.

    Args:
        out, out2: `[N, H, D]`; lse, lse2: natural-log `[H, N]`. Differentiable in all four.

    Returns:
        The out and lse that one call over the union of the keys would give.
    """
    if out.shape != out2.shape or lse.shape != lse2.shape:
        raise ValueError(
            f"merge: expected two results of one shape, got out {tuple(out.shape)} and "
            f"{tuple(out2.shape)}, lse {tuple(lse.shape)} and {tuple(lse2.shape)}"
        )
    both = torch.logaddexp(lse, lse2)
    finite = both.masked_fill(both == float("-inf"), 0.0)  # -inf - -inf would be NaN
    weight = torch.exp(lse - finite).mT[..., None]
    weight2 = torch.exp(lse2 - finite).mT[..., None]
    return (out * weight + out2 * weight2).to(out.dtype), both


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"packed_attention: {name} expected [tokens, heads, head_dim], got {tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"packed_attention: {name} expected a float dtype shared by q, k and v, "
                f"got {x.dtype} (q is {q.dtype})"
            )
        if x.device != q.device:
            raise ValueError(f"packed_attention: {name} expected on {q.device}, got {x.device}")
    if k.shape != v.shape:
        raise ValueError(
            f"packed_attention: k and v expected the same shape, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"packed_attention: k expected head dim {q.shape[2]} as q, got {k.shape[2]}"
        )
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"packed_attention: head dim expected 1 to {MAX_HEAD_DIM}, got {q.shape[2]}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"packed_attention: the heads of k expected to divide those of q ({q.shape[1]}), "
            f"got {k.shape[1]}"
        )


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, x: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"packed_attention: {name} expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"packed_attention: {name} expected shape [segments + 1], got "
            f"{tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"packed_attention: {name} expected on {x.device}, got {cu_seqlens.device}"
        )


def _host_lengths(name: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] != num_tokens:
        raise ValueError(
            f"packed_attention: {name} expected to rise from 0 to {num_tokens}, the number of "
            f"tokens, got {ends if len(ends) <= 8 else f'[{ends[0]}, ..., {ends[-1]}]'}"
        )
    return lengths
