"""flash-attn's functions on this package's attention: ``from sora_kernels.flash_attn import ...``.

The signatures are those of flash-attn 2 (Dao, arXiv 2307.08691), so that code written for it runs
on a CPU, with a deterministic backward, and at head dims it does not take. What is not offered is
an error that names it, not a wrong answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops.packed_attention import packed_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a dense batch.

    Args:
        q: ``[B, L, H, D]``; fp32, bf16 or fp16.
        k, v: ``[B, Lk, Hk, D]``; Hk divides H.
        softmax_scale: default ``D ** -0.5``.
        causal: aligned bottom-right: query i sees the keys ``j <= i + Lk - L``.
        deterministic: ours always is; False allows a library on a GPU whose backward is not.
        return_attn_probs: return ``(out, lse, None)``, lse fp32 ``[B, H, L]``.
        dropout_p, window_size, softcap, alibi_slopes: their defaults only.

    Raises:
        NotImplementedError: something is asked for that is not offered, by name.
        TypeError, ValueError: as ``packed_attention``.
    """
    _refuse(dropout_p, window_size, softcap, alibi_slopes)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected [B, L, heads, head dim], got {tuple(x.shape)}")
    batch, length, heads = q.shape[:3]
    if k.shape[0] != batch:
        raise ValueError(f"k: expected batch {batch} as q has, got {k.shape[0]}")
    cu_q, cu_k = (
        torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device)
        if n
        else torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
        for n in (length, k.shape[1])
    )
    found = packed_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens=cu_q, max_seqlen=length,
        cu_seqlens_k=cu_k, max_seqlen_k=k.shape[1], softmax_scale=softmax_scale, causal=causal,
        return_lse=return_attn_probs, deterministic=deterministic,
    )  # fmt: skip
    if not return_attn_probs:
        return found.unflatten(0, (batch, length))
    out, lse = found
    return (
        out.unflatten(0, (batch, length)),
        lse.unflatten(1, (batch, length)).transpose(0, 1),
        None,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within the segments of a packed batch.

    Args:
        q: ``[N, H, D]``; fp32, bf16 or fp16.
        k, v: ``[Nk, Hk, D]``; Hk divides H.
        cu_seqlens_q, cu_seqlens_k: int32 ``[S + 1]``, running sums of the lengths.
        max_seqlen_q, max_seqlen_k: the longest lengths, or bounds of them.
        return_attn_probs: return ``(out, lse, None)``, lse fp32 ``[H, N]``.
        block_table: None only. The others are as in :func:`flash_attn_func`.

    Raises:
        NotImplementedError: something is asked for that is not offered, by name.
        TypeError, ValueError: as ``packed_attention``.
    """
    _refuse(dropout_p, window_size, softcap, alibi_slopes)
    if block_table is not None:
        raise NotImplementedError("block_table: a paged key cache is not offered, expected None")
    found = packed_attention(
        q, k, v, cu_seqlens=cu_seqlens_q, max_seqlen=max_seqlen_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
        return_lse=return_attn_probs, deterministic=deterministic,
    )  # fmt: skip
    return (*found, None) if return_attn_probs else found


def _refuse(
    dropout_p: float,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    for name, value, refused in (
        ("dropout_p", dropout_p, dropout_p != 0.0),
        ("window_size", window_size, tuple(window_size) != (-1, -1)),
        ("softcap", softcap, softcap != 0.0),
        ("alibi_slopes", "a tensor", alibi_slopes is not None),
    ):
        if refused:
            raise NotImplementedError(f"{name}: only the default is offered, got {value}")
