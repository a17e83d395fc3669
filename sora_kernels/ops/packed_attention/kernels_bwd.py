"""Backward of packed flash attention: delta, then dk and dv by key block, then dq by query block.

Two passes instead of one with atomics: every sum has one order, so every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv
from .._launch import launch as run
from .config import config_for
from .descriptors import describe
from .kernels import (
    LOG2E,
    RUN_TIME,
    _bounds,
    _dot,
    _first_query,
    _load_block,
    _load_rows,
    _load_tile,
    _locate,
    _store_rows,
    _zeros,
    grid,
    in_steps,
    options,
    upcast,
)
from .work import work_list

DELTA_BLOCK = 32


@triton.jit(do_not_specialize=["num_tokens", "heads", "stride_on", "stride_oh"])
def _packed_attention_bwd_kernel_delta(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, log2_ptr, delta_ptr, num_tokens, heads, stride_on,
    stride_oh,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """delta = sum_d out * dout - dlse, so that ds = p * (dp - delta) holds for both gradients; and
    lse in units of log2, +inf where a row saw no key, so that p becomes 0."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid % heads
    first = pid // heads * BLOCK
    o_m = tl.arange(0, BLOCK)
    left = num_tokens - first
    out = _load_tile(
        out_ptr + (first * heads + head) * D, o_m, left, heads * D, 0, WIDTH, D, True
    )  # [BLOCK, D]
    stride_n = stride_on * STEP
    dout = _load_tile(
        dout_ptr + first * stride_n + head * (stride_oh * STEP), o_m, left, stride_n, 0, WIDTH, D,
        True,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = head * num_tokens + first + o_m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=o_m < left, other=0.0)
    tl.store(delta_ptr + row, delta, mask=o_m < left)
    lse = tl.load(lse_ptr + row, mask=o_m < left, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(log2_ptr + row, lse * LOG2E, mask=o_m < left)


@triton.jit
def _load_numbers(base, rows, left, MASKED: tl.constexpr):
    """A number of each row (lse, delta), zero where there is none (if MASKED): of such a row q and
    dout are zero as well, so that it adds nothing to any gradient."""
    if MASKED:
        return tl.load(base + rows, mask=rows < left, other=0.0)
    else:
        return tl.load(base + rows)


@triton.jit
def _add_dq(
    q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, row, start, end, rows, limit, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds ds @ k of a block of key rows to dq; the arguments are those of `_attend_block`."""
    o_n = tl.arange(0, BLOCK_N)
    left = end - start
    k1 = _load_block(k, row, left, 0, D1, D, BLOCK_N, MASKED)
    v1 = _load_block(v, row, left, 0, D1, D, BLOCK_N, MASKED)
    scores = _dot(q1, tl.trans(k1), UPCAST)
    dp = _dot(do1, tl.trans(v1), UPCAST)
    if D2 > 0:
        k2 = _load_block(k, row, left, D1, D2, D, BLOCK_N, MASKED)
        v2 = _load_block(v, row, left, D1, D2, D, BLOCK_N, MASKED)
        scores += _dot(q2, tl.trans(k2), UPCAST)
        dp += _dot(do2, tl.trans(v2), UPCAST)
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    if CAUSAL:
        columns = start + o_n
        seen = (columns < end)[None, :] & (columns[None, :] <= rows[:, None] + limit)
        p = tl.where(seen, p, 0.0)
    elif MASKED:
        if left < BLOCK_N:
            p = tl.where((o_n < left)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    if not UPCAST:
        ds = ds.to(q1.dtype)
    dq1 += _dot(ds, k1, UPCAST)
    if D2 > 0:
        dq2 += _dot(ds, k2, UPCAST)
    return dq1, dq2


@triton.jit
def _gather_dq(
    q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, rows, begin, end, len_k, limit, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds ds @ k of the key rows [begin, end) to dq."""
    for start in range(begin, end, BLOCK_N):
        dq1, dq2 = _add_dq(
            q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, start, start, len_k, rows, limit,
            scale_log2, D, D1, D2, BLOCK_N, MASKED, MASKED, UPCAST,
        )  # fmt: skip
    return dq1, dq2


@triton.jit(do_not_specialize=RUN_TIME)
def _packed_attention_bwd_kernel_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, cu_q_ptr, cu_k_ptr,
    k1_desc, k2_desc, v1_desc, v2_desc, num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    scale, causal,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq = scale * (p * (dout v^T - delta)) k for one block of query rows."""
    head, segment, block = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    begin_q, begin_k, len_q, len_k = _bounds(cu_q_ptr, cu_k_ptr, segment)
    start_m = _first_query(block, len_q, causal, BLOCK_M)
    if start_m < 0:
        return
    first = (begin_q + start_m).to(tl.int64)
    head_q = head.to(tl.int64)
    head_k = head // group_size
    o_m = tl.arange(0, BLOCK_M)
    left_q = len_q - start_m

    q1, q2 = _load_rows(
        q_ptr, stride_qn * STEP, stride_qh * STEP, head, first, left_q, BLOCK_M, D, D1, D2
    )  # fmt: skip
    do1, do2 = _load_rows(
        dout_ptr, stride_on * STEP, stride_oh * STEP, head, first, left_q, BLOCK_M, D, D1, D2
    )  # fmt: skip
    dq1, dq2 = _zeros(BLOCK_M, D1, D2)
    numbers = head_q * num_tokens + first
    lse = _load_numbers(lse_ptr + numbers, o_m, left_q, True)
    delta = _load_numbers(delta_ptr + numbers, o_m, left_q, True)

    limit = tl.where(causal != 0, len_k - len_q, len_k)
    end = tl.maximum(tl.minimum(len_k, start_m + BLOCK_M + limit), 0)
    full = tl.maximum(tl.minimum(len_k, start_m + limit + 1), 0) // BLOCK_N * BLOCK_N
    rows = start_m + o_m
    scale_log2 = scale * LOG2E
    k = (k_ptr, stride_kn * STEP, stride_kh * STEP, k1_desc, k2_desc, head_k, begin_k)
    v = (v_ptr, stride_vn * STEP, stride_vh * STEP, v1_desc, v2_desc, head_k, begin_k)
    # The blocks that need masks first, as in the forward.
    dq1, dq2 = _gather_dq(
        q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, rows, full, end, len_k, limit,
        scale_log2, D, D1, D2, BLOCK_N, True, UPCAST,
    )  # fmt: skip
    dq1, dq2 = _gather_dq(
        q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, rows, 0, full, len_k, limit,
        scale_log2, D, D1, D2, BLOCK_N, False, UPCAST,
    )  # fmt: skip
    _store_rows(dq_ptr, dq1 * scale, dq2 * scale, heads, head, first, left_q, BLOCK_M, D, D1, D2)


@triton.jit
def _add_dkv(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, columns, row, start, end,
    limit, scale_log2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds p^T @ dout to dv and ds^T @ q to dk for the queries from `row` of the sources on.

    They are the queries from `start` on, short of `end` if MASKED. If CAUSAL, key j is seen by
    row i iff j <= i + limit.
    """
    o_m = tl.arange(0, BLOCK_M)
    left = end - start
    q1 = _load_block(q, row, left, 0, D1, D, BLOCK_M, MASKED)
    do1 = _load_block(do, row, left, 0, D1, D, BLOCK_M, MASKED)
    lse = _load_numbers(lse_base + row, o_m, left, MASKED)
    scores = _dot(k1, tl.trans(q1), UPCAST)  # [BLOCK_N, BLOCK_M]
    if D2 > 0:
        q2 = _load_block(q, row, left, D1, D2, D, BLOCK_M, MASKED)
        do2 = _load_block(do, row, left, D1, D2, D, BLOCK_M, MASKED)
        scores += _dot(k2, tl.trans(q2), UPCAST)
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    if CAUSAL:
        p = tl.where(columns[:, None] <= (start + o_m)[None, :] + limit, p, 0.0)
    if UPCAST:
        p_low = p
    else:
        p_low = p.to(q1.dtype)
    dv1 += _dot(p_low, do1, UPCAST)
    delta = _load_numbers(delta_base + row, o_m, left, MASKED)
    dp = _dot(v1, tl.trans(do1), UPCAST)
    if D2 > 0:
        dv2 += _dot(p_low, do2, UPCAST)
        dp += _dot(v2, tl.trans(do2), UPCAST)
    ds = p * (dp - delta[None, :])
    if not UPCAST:
        ds = ds.to(q1.dtype)
    dk1 += _dot(ds, q1, UPCAST)
    if D2 > 0:
        dk2 += _dot(ds, q2, UPCAST)
    return dk1, dk2, dv1, dv2


@triton.jit
def _gather_dkv(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, columns, blocks_low,
    begin_low, blocks, begin, len_q, limit, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv over `blocks` blocks of query rows.

    The first `blocks_low` of them start at row `begin_low`, the others at row `begin`.
    """
    for i in range(blocks):
        start = tl.where(
            i < blocks_low, begin_low + i * BLOCK_M, begin + (i - blocks_low) * BLOCK_M
        )
        dk1, dk2, dv1, dv2 = _add_dkv(
            k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, columns, start,
            start, len_q, limit, scale_log2, D, D1, D2, BLOCK_M, MASKED, MASKED, UPCAST,
        )  # fmt: skip
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=RUN_TIME)
def _packed_attention_bwd_kernel_dkv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, cu_q_ptr,
    cu_k_ptr, q1_desc, q2_desc, do1_desc, do2_desc, num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    scale, causal,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dv = p^T dout and dk = scale * ds^T q for one block of key rows and one head of queries."""
    head, segment, block = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    begin_q, begin_k, len_q, len_k = _bounds(cu_q_ptr, cu_k_ptr, segment)
    start_n = block * BLOCK_N
    if start_n >= len_k:
        return
    first = (begin_k + start_n).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    left_k = len_k - start_n

    head_k = head // group_size
    k1, k2 = _load_rows(
        k_ptr, stride_kn * STEP, stride_kh * STEP, head_k, first, left_k, BLOCK_N, D, D1, D2
    )  # fmt: skip
    v1, v2 = _load_rows(
        v_ptr, stride_vn * STEP, stride_vh * STEP, head_k, first, left_k, BLOCK_N, D, D1, D2
    )  # fmt: skip
    dk1, dk2 = _zeros(BLOCK_N, D1, D2)
    dv1, dv2 = _zeros(BLOCK_N, D1, D2)

    # Query rows, in blocks: [low, diagonal) see some keys of this block, [diagonal, whole) see all
    # of them, and [whole, len_q) is the last, partial block.
    limit = tl.where(causal != 0, len_k - len_q, len_k)
    low = tl.minimum(tl.maximum(start_n - limit, 0), len_q) // BLOCK_M * BLOCK_M
    whole = tl.maximum(len_q // BLOCK_M * BLOCK_M, low)
    diagonal = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - limit, 0), BLOCK_M) * BLOCK_M
    diagonal = tl.minimum(tl.maximum(diagonal, low), whole)
    blocks_low = (diagonal - low) // BLOCK_M
    blocks_masked = blocks_low + tl.cdiv(len_q - whole, BLOCK_M)
    columns = start_n + o_n
    scale_log2 = scale * LOG2E
    head_q = head.to(tl.int64)
    lse_base = lse_ptr + head_q * num_tokens + begin_q
    delta_base = delta_ptr + head_q * num_tokens + begin_q
    q = (q_ptr, stride_qn * STEP, stride_qh * STEP, q1_desc, q2_desc, head, begin_q)
    do = (dout_ptr, stride_on * STEP, stride_oh * STEP, do1_desc, do2_desc, head, begin_q)
    # The loop with masks first: what it needs then takes no registers from the long one.
    dk1, dk2, dv1, dv2 = _gather_dkv(
        k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, columns, blocks_low,
        low, blocks_masked, whole, len_q, limit, scale_log2,
        D, D1, D2, BLOCK_M, True, UPCAST,
    )  # fmt: skip
    dk1, dk2, dv1, dv2 = _gather_dkv(
        k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, columns, 0, 0,
        (whole - diagonal) // BLOCK_M, diagonal, len_q, limit, scale_log2,
        D, D1, D2, BLOCK_M, False, UPCAST,
    )  # fmt: skip
    _store_rows(dk_ptr, dk1 * scale, dk2 * scale, heads, head, first, left_k, BLOCK_N, D, D1, D2)
    _store_rows(dv_ptr, dv1, dv2, heads, head, first, left_k, BLOCK_N, D, D1, D2)


def row_numbers(
    out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(lse in units of log2, delta), fp32 `[H, N]`; `dout` has rows of stride 1."""
    num_tokens, heads, head_dim = out.shape
    log2, delta = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    step, strides = in_steps(dout)
    run(
        _packed_attention_bwd_kernel_delta, (cdiv(num_tokens, DELTA_BLOCK) * heads,), out.device,
        out, dout, lse, lse if dlse is None else dlse.contiguous(), log2, delta,
        num_tokens, heads, *strides,
        HAS_DLSE=dlse is not None, D=head_dim, WIDTH=1 << (head_dim - 1).bit_length(),
        BLOCK=DELTA_BLOCK, STEP=step, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return log2, delta


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, work_dq: Tensor | None, work_dkv: Tensor | None, max_seqlen: int,
    max_seqlen_k: int, scale: float, causal: bool, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv); what is not needed comes back empty."""
    config = config_for(q)
    num_tokens, heads, head_dim = q.shape
    heads_k = k.shape[1]
    dq = q.new_empty(q.shape if need_dq else (0,))
    # Grouped heads: each query head writes its own fp32 share, and the shares are summed in order.
    group = heads // heads_k
    share = torch.float32 if group > 1 else k.dtype
    dk = k.new_empty((k.shape[0], heads, head_dim) if need_dkv else (0,), dtype=share)
    dv = v.new_empty((k.shape[0], heads, head_dim) if need_dkv else (0,), dtype=share)
    if dout.stride(-1) != 1:  # an expanded gradient; the kernels read rows
        dout = dout.contiguous()
    lse, delta = row_numbers(out, dout, lse, dlse)
    step, strides = in_steps(q, k, v, dout)
    dims = {
        "D": head_dim, "D1": config.dim1, "D2": config.dim2, "STEP": step, "UPCAST": upcast(q),
    }  # fmt: skip
    if need_dkv and k.shape[0]:
        launch = config.dkv
        if work_dkv is None:
            work_dkv = work_list(cu_k, k.shape[0], launch.block_n, cu_q.diff())
        descs = describe(launch, config, (launch.block_m,), q, dout)
        run(
            _packed_attention_bwd_kernel_dkv, grid(work_dkv.shape[0], heads, launch.group),
            q.device, q, k, v, dout, lse, delta, dk, dv, work_dkv, cu_q, cu_k, *descs,
            num_tokens, work_dkv.shape[0], heads, group, *strides, scale, int(causal),
            **dims, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, GROUP=launch.group,
            **options(launch, descs),
        )  # fmt: skip
    if need_dq and num_tokens:
        launch = config.dq
        if work_dq is None:
            work_dq = work_list(cu_q, num_tokens, launch.block_m, cu_k.diff())
        descs = describe(launch, config, (launch.block_n,), k, v)
        run(
            _packed_attention_bwd_kernel_dq, grid(work_dq.shape[0], heads, launch.group),
            q.device, q, k, v, dout, lse, delta, dq, work_dq, cu_q, cu_k, *descs,
            num_tokens, work_dq.shape[0], heads, group, *strides, scale, int(causal),
            **dims, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, GROUP=launch.group,
            **options(launch, descs),
        )  # fmt: skip
    if need_dkv and group > 1:
        dk, dv = (x.unflatten(1, (heads_k, group)).sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv
