"""The backward of a block of attention in plain PyTorch, given the LSE of all keys."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths_q: list[int], lengths_k: list[int], scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dv = p^T dout, ds = p (dout v^T - delta), dq = scale ds k, dk = scale ds^T q, written out.

    Autograd through the reference forward does not know the LSE of keys on other ranks.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    delta = (dout.to(wide) * out.to(wide)).sum(-1).mT
    delta = delta if dlse is None else delta - dlse
    grads: tuple[list[Tensor], ...] = ([], [], [])
    heads_first = [x.to(wide).transpose(0, 1) for x in (q, dout, k, v)]
    q_all, dout_all = (x.split(lengths_q, 1) for x in heads_first[:2])
    k_all, v_all = (x.repeat_interleave(group, 0).split(lengths_k, 1) for x in heads_first[2:])
    lse_all, delta_all = (x.split(lengths_q, 1) for x in (lse, delta))
    for q_h, do_h, k_h, v_h, lse_h, delta_h in zip(
        q_all, dout_all, k_all, v_all, lse_all, delta_all, strict=True
    ):
        p = torch.exp(q_h @ k_h.mT * scale - lse_h[..., None])
        p = p.tril() if causal else p  # own slice: as many queries as keys
        ds = p * (do_h @ v_h.mT - delta_h[..., None]) * scale
        for made, grad in zip(grads, (ds @ k_h, ds.mT @ q_h, p.mT @ do_h), strict=True):
            made.append(grad)
    dq, dk, dv = (
        torch.cat(made, 1) if made else q.new_zeros((q.shape[1], 0, q.shape[2])) for made in grads
    )
    dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    dq, dk, dv = (x.transpose(0, 1).to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv
