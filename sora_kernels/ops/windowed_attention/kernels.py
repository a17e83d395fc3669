"""Flash attention within 3-D tile windows: the Triton forward kernel and what both files share.

One program = one block of query rows of one head, all of one tile (or all outside the main grid):
`work[w] = segment, first row, end of the piece, tile`. Its keys are the ranges of `device.plan`,
read in one loop. The arithmetic per block of keys is `packed_attention`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import launch as run
from ..packed_attention.descriptors import describe
from ..packed_attention.kernels import (
    LN2,
    LOG2E,
    _attend_block,
    _load_rows,
    _store_rows,
    _zeros,
    grid,
    in_steps,
    options,
    upcast,
)
from ..packed_attention.kernels import RUN_TIME as DENSE_RUN_TIME
from .config import config_for
from .device import block_at, plan

if TYPE_CHECKING:
    from ...aot import AotCase

# Also the modes of the window: one compiled kernel serves all.
RUN_TIME = (
    *DENSE_RUN_TIME,
    "back_t",
    "back_h",
    "back_w",
    "ahead_t",
    "ahead_h",
    "ahead_w",
    "clamp",
    "sink",
)


@triton.jit
def _locate(work_ptr, num_work, heads, GROUP: tl.constexpr):
    """(head, segment, first row, end, tile) of this program; segment -1 = nothing to do.

    GROUP neighbours of the work list run on one head, then on the next: the dearest blocks still
    start first, and programs that run together read the same keys.
    """
    pid = tl.program_id(0)
    w = pid // (GROUP * heads) * GROUP + pid % GROUP
    head = pid // GROUP % heads
    inside = w < num_work
    row = work_ptr + 4 * w
    segment = tl.load(row, mask=inside, other=-1)
    first = tl.load(row + 1, mask=inside, other=0)
    end = tl.load(row + 2, mask=inside, other=0)
    tile = tl.load(row + 3, mask=inside, other=-1)
    return head, segment, first, end, tile


@triton.jit(do_not_specialize=RUN_TIME)
def _windowed_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, cu_ptr, table_ptr,
    k1_desc, k2_desc, v1_desc, v2_desc, num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale,
    back_t, back_h, back_w, ahead_t, ahead_h, ahead_w, clamp, causal, sink,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and lse over the keys that a block of queries sees."""
    head, segment, start_m, end_m, tile = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    origin = tl.load(cu_ptr + segment)
    length = tl.load(cu_ptr + segment + 1) - origin
    blocks, where = plan(
        table_ptr, segment, tile, length, back_t, back_h, back_w, ahead_t, ahead_h, ahead_w,
        clamp, causal, sink, BLOCK_N, False,
    )  # fmt: skip
    first = (origin + start_m).to(tl.int64)  # of this block in the pack
    head_k = head // group_size
    o_m = tl.arange(0, BLOCK_M)
    left_q = end_m - start_m

    q1, q2 = _load_rows(
        q_ptr, stride_qn * STEP, stride_qh * STEP, head, first, left_q, BLOCK_M, D, D1, D2
    )  # fmt: skip
    acc1, acc2 = _zeros(BLOCK_M, D1, D2)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    k = (k_ptr, stride_kn * STEP, stride_kh * STEP, k1_desc, k2_desc, head_k, origin)
    v = (v_ptr, stride_vn * STEP, stride_vh * STEP, v1_desc, v2_desc, head_k, origin)
    scale_log2 = scale * LOG2E
    for x in range(blocks):
        row, left = block_at(x, where, BLOCK_N)
        acc1, acc2, m_i, l_i = _attend_block(
            q1, q2, acc1, acc2, m_i, l_i, k, v, row, 0, left, 0, 0, scale_log2,
            D, D1, D2, BLOCK_N, True, False, UPCAST,
        )  # fmt: skip

    # Every query sees a key (itself), so l_i > 0.
    inverse = 1.0 / l_i
    acc1 *= inverse[:, None]
    if D2 > 0:
        acc2 *= inverse[:, None]
    _store_rows(out_ptr, acc1, acc2, heads, head, first, left_q, BLOCK_M, D, D1, D2)
    lse_base = lse_ptr + head.to(tl.int64) * num_tokens + first
    tl.store(lse_base + o_m, (m_i + tl.log2(l_i)) * LN2, mask=o_m < left_q)


def listed(name: str, work: Tensor | None) -> Tensor:
    if work is None:
        raise ValueError(f"{name}: expected the list of layout.window_work(...), got None")
    return work


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, table: Tensor,
    work: Tensor | None, window: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `[N, H, D]` and natural-log lse fp32 `[H, N]`.

    Args:
        q: `[N, H, D]`; k, v: `[N, Hk, D]`; any strides with `stride(-1) == 1`.
        cu_seqlens: int32 `[S + 1]`.
        table: `layout.window_table()`.
        work: `layout.window_work(config_for(q).fwd.block_m, window, "query")`.
        window: `Window.as_ints()`.

    Raises:
        ValueError: there is no work list; only the layout can build one.
    """
    config = config_for(q)
    num_tokens, heads, head_dim = q.shape
    out = q.new_empty((num_tokens, heads, head_dim))
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    launch = config.fwd
    if num_tokens == 0 or heads == 0:
        return out, lse
    work = listed("work", work)
    step, strides = in_steps(q, k, v)
    descs = describe(launch, config, (launch.block_n,), k, v)
    run(
        _windowed_attention_fwd_kernel, grid(work.shape[0], heads, launch.group), q.device,
        q, k, v, out, lse, work, cu_seqlens, table, *descs,
        num_tokens, work.shape[0], heads, heads // k.shape[1], *strides, scale, *window,
        D=head_dim, D1=config.dim1, D2=config.dim2,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STEP=step, GROUP=launch.group,
        UPCAST=upcast(q), **options(launch, descs),
    )  # fmt: skip
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op windowed_attention_bwd."""
    from . import kernels_bwd

    return kernels_bwd.backward(*args)


def aot_cases() -> list[AotCase]:
    """What `sora_kernels.aot` compiles: forward and backward at the launches of every chip."""
    from . import aot_cases as listing

    return listing.aot_cases()
