"""Backward of windowed attention: delta, then dk and dv by key block, then dq by query block.

dk and dv walk the inverse window. Two passes instead of one with atomics: every sum has one order,
so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import launch as run
from ..packed_attention.descriptors import describe
from ..packed_attention.kernels import (
    LOG2E,
    _load_rows,
    _store_rows,
    _zeros,
    grid,
    in_steps,
    options,
    upcast,
)
from ..packed_attention.kernels_bwd import (
    _add_dkv,
    _add_dq,
    _load_numbers,
    row_numbers,
)
from .config import config_for
from .device import block_at, plan
from .kernels import RUN_TIME, _locate, listed


@triton.jit(do_not_specialize=RUN_TIME)
def _windowed_attention_bwd_kernel_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, cu_ptr, table_ptr,
    k1_desc, k2_desc, v1_desc, v2_desc, num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh, scale,
    back_t, back_h, back_w, ahead_t, ahead_h, ahead_w, clamp, causal, sink,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq = scale * (p * (dout v^T - delta)) k over the keys that a block of queries sees."""
    head, segment, start_m, end_m, tile = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    origin = tl.load(cu_ptr + segment)
    length = tl.load(cu_ptr + segment + 1) - origin
    blocks, where = plan(
        table_ptr, segment, tile, length, back_t, back_h, back_w, ahead_t, ahead_h, ahead_w,
        clamp, causal, sink, BLOCK_N, False,
    )  # fmt: skip
    first = (origin + start_m).to(tl.int64)
    head_q = head.to(tl.int64)
    head_k = head // group_size
    o_m = tl.arange(0, BLOCK_M)
    left_q = end_m - start_m

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

    k = (k_ptr, stride_kn * STEP, stride_kh * STEP, k1_desc, k2_desc, head_k, origin)
    v = (v_ptr, stride_vn * STEP, stride_vh * STEP, v1_desc, v2_desc, head_k, origin)
    scale_log2 = scale * LOG2E
    for x in range(blocks):
        row, left = block_at(x, where, BLOCK_N)
        dq1, dq2 = _add_dq(
            q1, q2, do1, do2, dq1, dq2, lse, delta, k, v, row, 0, left, 0, 0, scale_log2,
            D, D1, D2, BLOCK_N, True, False, UPCAST,
        )  # fmt: skip
    _store_rows(dq_ptr, dq1 * scale, dq2 * scale, heads, head, first, left_q, BLOCK_M, D, D1, D2)


@triton.jit(do_not_specialize=RUN_TIME)
def _windowed_attention_bwd_kernel_dkv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, cu_ptr,
    table_ptr, q1_desc, q2_desc, do1_desc, do2_desc, num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh, scale,
    back_t, back_h, back_w, ahead_t, ahead_h, ahead_w, clamp, causal, sink,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dv = p^T dout and dk = scale * ds^T q over the queries that see a block of keys."""
    head, segment, start_n, end_n, tile = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    origin = tl.load(cu_ptr + segment)
    length = tl.load(cu_ptr + segment + 1) - origin
    blocks, where = plan(
        table_ptr, segment, tile, length, back_t, back_h, back_w, ahead_t, ahead_h, ahead_w,
        clamp, causal, sink, BLOCK_M, True,
    )  # fmt: skip
    first = (origin + start_n).to(tl.int64)
    head_q = head.to(tl.int64)
    head_k = head // group_size
    left_k = end_n - start_n

    k1, k2 = _load_rows(
        k_ptr, stride_kn * STEP, stride_kh * STEP, head_k, first, left_k, BLOCK_N, D, D1, D2
    )  # fmt: skip
    v1, v2 = _load_rows(
        v_ptr, stride_vn * STEP, stride_vh * STEP, head_k, first, left_k, BLOCK_N, D, D1, D2
    )  # fmt: skip
    dk1, dk2 = _zeros(BLOCK_N, D1, D2)
    dv1, dv2 = _zeros(BLOCK_N, D1, D2)

    q = (q_ptr, stride_qn * STEP, stride_qh * STEP, q1_desc, q2_desc, head, origin)
    do = (dout_ptr, stride_on * STEP, stride_oh * STEP, do1_desc, do2_desc, head, origin)
    lse_base = lse_ptr + head_q * num_tokens + origin
    delta_base = delta_ptr + head_q * num_tokens + origin
    scale_log2 = scale * LOG2E
    for x in range(blocks):
        row, left = block_at(x, where, BLOCK_M)
        dk1, dk2, dv1, dv2 = _add_dkv(
            k1, k2, v1, v2, dk1, dk2, dv1, dv2, q, do, lse_base, delta_base, 0, row, 0, left, 0,
            scale_log2, D, D1, D2, BLOCK_M, True, False, UPCAST,
        )  # fmt: skip
    _store_rows(dk_ptr, dk1 * scale, dk2 * scale, heads, head, first, left_k, BLOCK_N, D, D1, D2)
    _store_rows(dv_ptr, dv1, dv2, heads, head, first, left_k, BLOCK_N, D, D1, D2)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, table: Tensor, work_dq: Tensor | None, work_dkv: Tensor | None,
    window: Sequence[int], scale: float, need_dq: bool, need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv); what is not needed comes back empty.

    Args:
        work_dq: `layout.window_work(config_for(q).dq.block_m, window, "query")`.
        work_dkv: `layout.window_work(config_for(q).dkv.block_n, window, "key")`.

    Raises:
        ValueError: a work list that is needed is missing; only the layout can build one.
    """
    config = config_for(q)
    num_tokens, heads, head_dim = q.shape
    heads_k = k.shape[1]
    dq = q.new_empty(q.shape if need_dq else (0,))
    # Grouped heads: each query head writes its own fp32 share, and the shares are summed in order.
    group = heads // heads_k
    share = torch.float32 if group > 1 else k.dtype
    dk = k.new_empty((num_tokens, heads, head_dim) if need_dkv else (0,), dtype=share)
    dv = v.new_empty((num_tokens, heads, head_dim) if need_dkv else (0,), dtype=share)
    if num_tokens == 0 or heads == 0:
        return dq, dk, dv
    if dout.stride(-1) != 1:  # an expanded gradient; the kernels read rows
        dout = dout.contiguous()
    lse, delta = row_numbers(out, dout, lse, dlse)
    step, strides = in_steps(q, k, v, dout)
    dims = {
        "D": head_dim, "D1": config.dim1, "D2": config.dim2, "STEP": step, "UPCAST": upcast(q),
    }  # fmt: skip
    if need_dkv:
        launch = config.dkv
        work_dkv = listed("work_dkv", work_dkv)
        descs = describe(launch, config, (launch.block_m,), q, dout)
        run(
            _windowed_attention_bwd_kernel_dkv, grid(work_dkv.shape[0], heads, launch.group),
            q.device, q, k, v, dout, lse, delta, dk, dv, work_dkv, cu_seqlens, table, *descs,
            num_tokens, work_dkv.shape[0], heads, group, *strides, scale, *window,
            **dims, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, GROUP=launch.group,
            **options(launch, descs),
        )  # fmt: skip
    if need_dq:
        launch = config.dq
        work_dq = listed("work_dq", work_dq)
        descs = describe(launch, config, (launch.block_n,), k, v)
        run(
            _windowed_attention_bwd_kernel_dq, grid(work_dq.shape[0], heads, launch.group),
            q.device, q, k, v, dout, lse, delta, dq, work_dq, cu_seqlens, table, *descs,
            num_tokens, work_dq.shape[0], heads, group, *strides, scale, *window,
            **dims, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, GROUP=launch.group,
            **options(launch, descs),
        )  # fmt: skip
    if need_dkv and group > 1:
        dk, dv = (x.unflatten(1, (heads_k, group)).sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv
