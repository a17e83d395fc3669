"""`packed_attention` on the CPU: PyTorch's flash kernel on each segment, no mask, nothing padded.

Neighbouring segments of equal lengths run as one batch. Reading the lengths of a CPU tensor waits
for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from .checks import host_lengths

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SHORT = 128
"""Keys up to which the backward of half precision runs in fp32: PyTorch's own takes 5 times as long
for segments of 16 tokens, 2.5 times for 64, as long for 256 (head dim 64, one AVX-512 core)."""

_Run = tuple[slice, slice, int, int, int, bool, Tensor | None]


def _runs(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, causal: bool) -> Iterator[_Run]:
    """(rows of q, rows of k, batch, len_q, len_k, is_causal, mask) of runs of equal segments.

    Rows that see no key are left out. PyTorch's `is_causal` aligns top-left, ours bottom-right:
    they differ only where len_q != len_k, and that takes a mask.
    """
    lengths_q = host_lengths("cu_seqlens", cu_q, q.shape[0])
    lengths_k = host_lengths("cu_seqlens_k", cu_k, k.shape[0])
    at_q = at_k = 0
    for (len_q, len_k), same in groupby(zip(lengths_q, lengths_k, strict=True)):
        batch = len(list(same))
        if len_q and len_k:
            if not causal or len_q == len_k:
                rows_q = slice(at_q, at_q + batch * len_q)
                rows_k = slice(at_k, at_k + batch * len_k)
                yield rows_q, rows_k, batch, len_q, len_k, causal, None
            else:
                blind = max(0, len_q - len_k)
                seeing = torch.ones(len_q - blind, len_k, dtype=torch.bool, device=q.device)
                seeing = seeing.tril(len_k - len_q + blind)
                mask = torch.zeros_like(seeing, dtype=q.dtype).masked_fill(~seeing, float("-inf"))
                for i in range(batch):
                    rows_q = slice(at_q + i * len_q + blind, at_q + (i + 1) * len_q)
                    rows_k = slice(at_k + i * len_k, at_k + (i + 1) * len_k)
                    yield rows_q, rows_k, 1, len_q - blind, len_k, False, mask
        at_q += batch * len_q
        at_k += batch * len_k


def _batch(x: Tensor, rows: slice, batch: int) -> Tensor:
    """Rows of `[N, H, D]` as a `[B, H, L, D]` view."""
    return x[rows].unflatten(0, (batch, -1)).transpose(1, 2)


def _batch_lse(lse: Tensor, rows: slice, batch: int) -> Tensor:
    """Columns of `[H, N]` as a `[B, H, L]` view."""
    return lse[:, rows].unflatten(1, (batch, -1)).transpose(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, work: Tensor | None,
    max_seqlen: int, max_seqlen_k: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, heads, head_dim = q.shape
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    out: Tensor | None = None
    covered = 0
    for rows_q, rows_k, batch, len_q, _, is_causal, mask in _runs(cu_q, cu_k, q, k, causal):
        part, part_lse = _forward(
            _batch(q, rows_q, batch), _batch(k, rows_k, batch), _batch(v, rows_k, batch),
            0.0, is_causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        _batch_lse(lse, rows_q, batch).copy_(part_lse)
        part = part.transpose(1, 2)
        covered += batch * len_q
        if batch * len_q == num_tokens and part.is_contiguous():  # one run is the whole pack
            return part.view(num_tokens, heads, head_dim), lse
        if out is None:
            out = q.new_empty((num_tokens, heads, head_dim))
        out[rows_q].view(part.shape).copy_(part)
    if out is None:
        out = q.new_zeros((num_tokens, heads, head_dim))
        lse.fill_(float("-inf"))
    elif covered < num_tokens:  # rows without a key: rare, so a second pass does no harm
        blind = torch.ones(num_tokens, dtype=torch.bool)
        for rows_q, *_ in _runs(cu_q, cu_k, q, k, causal):
            blind[rows_q] = False
        out[blind] = 0.0
        lse[:, blind] = float("-inf")
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, work_dq: Tensor | None, work_dkv: Tensor | None, max_seqlen: int,
    max_seqlen_k: int, scale: float, causal: bool, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if dlse is not None:
        q, k, v, out, dout = _fold_dlse(dlse, q, k, v, out, dout)
    head_dim = q.shape[-1] if dlse is None else q.shape[-1] - 1
    runs = list(_runs(cu_q, cu_k, q, k, causal))
    covered_q = sum(batch * len_q for _, _, batch, len_q, *_ in runs)
    covered_k = sum(batch * len_k for _, _, batch, _, len_k, *_ in runs)
    whole = len(runs) == 1 and covered_q == q.shape[0] and covered_k == k.shape[0]
    full = (covered_q == q.shape[0], *[covered_k == k.shape[0]] * 2)
    grads: list[Tensor] = []
    if not whole:  # only rows that no run covers need the zeros
        for x, all_rows in zip((q, k, v), full, strict=True):
            shape = (*x.shape[:-1], head_dim)
            grads.append(x.new_empty(shape) if all_rows else x.new_zeros(shape))
    for rows_q, rows_k, batch, _, len_k, is_causal, mask in runs:
        rows = (rows_q, rows_q, rows_k, rows_k, rows_q)
        given = [_batch(x, r, batch) for x, r in zip((dout, q, k, v, out), rows, strict=True)]
        if len_k <= SHORT:
            given = [x.float() for x in given]
            mask = None if mask is None else mask.float()
        parts = _backward(
            *given, _batch_lse(lse, rows_q, batch), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        if whole:  # already in our layout
            grads = [part[..., :head_dim].transpose(1, 2).flatten(0, 1) for part in parts]
            break
        for grad, part, r in zip(grads, parts, (rows_q, rows_k, rows_k), strict=True):
            _batch(grad, r, batch).copy_(part[..., :head_dim])
    empty = q.new_empty(0)
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in grads)
    return (
        dq if need_dq else empty,
        dk if need_dkv else empty.clone(),
        dv if need_dkv else empty.clone(),
    )


def _fold_dlse(
    dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor
) -> tuple[Tensor, ...]:
    """Inputs with one more column, for which PyTorch's backward adds the gradient of the LSE.

    It computes ds = p * (dout v^T - sum(dout * out)). With v = 1, dout = dlse and out = 0 in the
    new column that is p * (dout v^T + dlse - sum(dout * out)), and q = k = 0 leaves p alone.
    """
    zero = q.new_zeros(())

    def widen(x: Tensor, column: Tensor) -> Tensor:
        return torch.cat((x, column.to(x.dtype).expand(*x.shape[:-1], 1)), -1)

    return (
        widen(q, zero), widen(k, zero), widen(v, zero + 1), widen(out, zero),
        widen(dout, dlse.mT[..., None]),
    )  # fmt: skip
