"""flash-attn's entry points against PyTorch's attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.flash_attn import flash_attn_func, flash_attn_varlen_func
from tests.helpers import randn


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """fp64, `[B, L, H, D]`: out and lse `[B, H, L]` under a bottom-right mask."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if causal:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        scores = scores.masked_fill(columns > rows + k.shape[2] - q.shape[2], float("-inf"))
    return (F.softmax(scores, -1) @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
def test_dense(causal: bool, heads_k: int) -> None:
    q = randn(2, 5, 4, 16).requires_grad_()
    k, v = (randn(2, 9, heads_k, 16, seed=s).requires_grad_() for s in (1, 2))
    out, lse, probabilities = flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=causal, return_attn_probs=True
    )
    exact, exact_lse = expected(q, k, v, 0.3, causal)
    assert probabilities is None
    torch.testing.assert_close(out, exact.float())
    torch.testing.assert_close(lse, exact_lse.float())
    dout = randn(*out.shape, seed=3)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(exact, (q, k, v), dout.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_varlen_is_dense_per_segment() -> None:
    lengths, lengths_k = [3, 0, 6], [5, 2, 6]
    cu, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths, lengths_k)
    )
    q, k, v = randn(9, 4, 8), randn(13, 2, 8, seed=1), randn(13, 2, 8, seed=2)
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu, cu_k, 6, 6, causal=True, return_attn_probs=True
    )
    pieces = zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [
        flash_attn_func(*(x[None] for x in piece), causal=True, return_attn_probs=True)
        for piece in pieces
    ]
    torch.testing.assert_close(out, torch.cat([o[0] for o, _, _ in alone]))
    torch.testing.assert_close(lse, torch.cat([s[0] for _, s, _ in alone], 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dropout_p", 0.1), ("window_size", (8, 0)), ("softcap", 30.0), ("alibi_slopes", randn(2))],
)
def test_what_is_not_offered_is_named(name: str, value: Any) -> None:
    q = randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=f"{name}: only the default"):
        flash_attn_func(q, q, q, **{name: value})
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=f"{name}: only the default"):
        flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, **{name: value})


def test_bad_input_is_named() -> None:
    q = randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="block_table"):
        cu = torch.tensor([0, 4], dtype=torch.int32)
        flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, block_table=cu)
    with pytest.raises(ValueError, match=r"q: expected \[B, L, heads, head dim\]"):
        flash_attn_func(q[0], q, q)
    with pytest.raises(ValueError, match="k: expected batch 1"):
        flash_attn_func(q, q.repeat(2, 1, 1, 1), q)
