"""What dense and windowed attention share: shapes of their raw ops, and the backward's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend


def fake_fwd(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def fake_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_dq, need_dkv = args[-2:]
    return (
        q.new_empty(q.shape if need_dq else (0,)),
        k.new_empty(k.shape if need_dkv else (0,)),
        v.new_empty(v.shape if need_dkv else (0,)),
    )


def gradients(
    op: str, ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv of a Function whose inputs 1 to 3 are q, k, v and which saved them, out, lse and
    the other tensors of the raw op, and has its numbers in ``ctx.statics``."""
    if dout is None and dlse is None:
        return None, None, None
    saved = ctx.saved_tensors
    out = saved[3]
    if dout is None:  # only the lse was used
        dout = out.new_zeros(out.shape)
    need_q, need_k, need_v = ctx.needs_input_grad[1:4]
    run = backend.implementation(op, "bwd", ctx.chosen, out)
    dq, dk, dv = run(dout, dlse, *saved, *ctx.statics, need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None
