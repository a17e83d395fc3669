"""`packed_attention` in plain PyTorch: the definition that every implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention inside each segment; returns `out [N, H, D]` and the natural-log `lse [H, N]`.

    Scores and softmax are at least fp32; probabilities are rounded to the dtype of `v` before they
    meet it, as every tensor-core attention does. A row that sees no key has `out = 0` and
    `lse = -inf`. Differentiable, in any float dtype.
    """
    heads = q.shape[1]
    groups = heads // k.shape[1] if k.shape[1] else 1
    wide = torch.promote_types(q.dtype, torch.float32)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for q_seg, k_seg, v_seg in zip(
        q.split(list(seqlens_q)), k.split(list(seqlens_k)), v.split(list(seqlens_k)), strict=True
    ):
        # Bottom-right alignment: query i sees the keys j <= i + offset.
        offset = k_seg.shape[0] - q_seg.shape[0]
        blind = q_seg.shape[0] if k_seg.shape[0] == 0 else max(0, -offset) if causal else 0
        if blind:
            everywhere = torch.ones((), dtype=torch.bool, device=q.device)
            outs.append(q_seg[:blind].masked_fill(everywhere, 0))
            lses.append(q_seg.new_full((heads, blind), float("-inf"), dtype=wide))
        if blind == q_seg.shape[0]:
            continue
        q_h = q_seg[blind:].transpose(0, 1).to(wide)
        k_h = k_seg.transpose(0, 1).repeat_interleave(groups, 0).to(wide)
        v_h = v_seg.transpose(0, 1).repeat_interleave(groups, 0)
        scores = q_h @ k_h.mT * softmax_scale
        if causal:
            row = torch.arange(blind, q_seg.shape[0], device=q.device)[:, None]
            column = torch.arange(k_seg.shape[0], device=q.device)
            scores = scores.masked_fill(column > row + offset, float("-inf"))
        lse = torch.logsumexp(scores, -1)
        probabilities = torch.exp(scores - lse[..., None]).to(v.dtype)
        outs.append((probabilities.to(wide) @ v_h.to(wide)).to(q.dtype).transpose(0, 1))
        lses.append(lse)
    if not outs:
        return q.clone(), q.new_zeros((heads, 0), dtype=wide)
    return torch.cat(outs), torch.cat(lses, 1)
