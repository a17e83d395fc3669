"""Flash attention over packed segments: the Triton forward kernel and what both files share.

One program = one block of query rows of one head of one segment (`work[w] = segment, block`).
Blocks start at the segment's first token, so a segment computes the same bits in any pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv
from .._launch import launch as run
from .config import FAR, Launch, config_for
from .descriptors import describe
from .work import work_list

if TYPE_CHECKING:
    from ...aot import AotCase

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(FAR)

# Sizes, strides and modes, which vary from call to call: one compiled kernel serves all.
RUN_TIME = (
    "num_tokens", "num_work", "heads", "group_size", "stride_qn", "stride_qh", "stride_kn",
    "stride_kh", "stride_vn", "stride_vh", "stride_on", "stride_oh", "causal",
)  # fmt: skip


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a @ b in fp32. The interpreter multiplies bf16 wrongly, so there the operands go up first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_tile(
    base, rows, row_end, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`[rows, FIRST : FIRST + WIDTH]`; zero beyond `row_end` (if MASKED) and beyond D."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > D:
        if MASKED:
            return tl.load(
                pointers, mask=(rows < row_end)[:, None] & (columns < D)[None, :], other=0.0
            )
        else:
            return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(pointers, mask=(rows < row_end)[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _load_block(
    source, row, left, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`[BLOCK, FIRST : FIRST + WIDTH]` from row `row` of a source on; zero beyond its end or D.

    A source is (tensor, its strides of tokens and heads, the descriptors of its first columns and
    of the others, head, first row of the segment). Without descriptors it is read by pointers. If
    MASKED, `left` rows are left and no other is read: what a neighbour in the pack holds, NaN
    included, never gets into a product.
    """
    ptr, stride_n, stride_h, desc1, desc2, head, origin = source
    if desc1 is None:
        base = ptr + origin.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
        far = tl.full((), 0, tl.int64) + row
        return _load_tile(
            base + far * stride_n, tl.arange(0, BLOCK), left, stride_n, FIRST, WIDTH, D, MASKED
        )
    else:
        if FIRST == 0:
            desc = desc1
        else:
            desc = desc2
        end = origin + row + left
        return tl.reshape(desc.load([_FAR, end, head, _FAR - left, FIRST]), [BLOCK, WIDTH])


@triton.jit
def _store_tile(
    base, value, rows, row_end, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows < row_end)[:, None] & (columns < D)[None, :]
    pointers = base + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_rows(
    ptr, stride_n, stride_h, head, first, left, BLOCK: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Both parts of the rows of a program, which it reads once; without D2 the first part twice."""
    base = ptr + first * stride_n + head.to(tl.int64) * stride_h
    rows = tl.arange(0, BLOCK)
    x1 = _load_tile(base, rows, left, stride_n, 0, D1, D, True)  # [BLOCK, D1]
    x2 = x1
    if D2 > 0:
        x2 = _load_tile(base, rows, left, stride_n, D1, D2, D, True)
    return x1, x2


@triton.jit
def _zeros(BLOCK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of a sum over `_load_block`s, fp32."""
    x1 = tl.zeros([BLOCK, D1], tl.float32)
    x2 = x1
    if D2 > 0:
        x2 = tl.zeros([BLOCK, D2], tl.float32)
    return x1, x2


@triton.jit
def _store_rows(
    ptr, x1, x2, heads, head, first, left, BLOCK: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Into a contiguous `[N, heads, D]`."""
    base = ptr + (first * heads + head) * D
    rows = tl.arange(0, BLOCK)
    _store_tile(base, x1, rows, left, heads * D, 0, D1, D)
    if D2 > 0:
        _store_tile(base, x2, rows, left, heads * D, D1, D2, D)


@triton.jit
def _locate(work_ptr, num_work, heads, GROUP: tl.constexpr):
    """(head, segment, block) of this program; segment -1 = nothing to do.

    GROUP neighbours of the work list run on one head, then on the next: longest segments still
    start first, and programs that run together read the same keys.
    """
    pid = tl.program_id(0)
    first = pid // (GROUP * heads) * GROUP
    w = first + pid % GROUP
    head = pid // GROUP % heads
    inside = w < num_work
    segment = tl.load(work_ptr + 2 * w, mask=inside, other=-1)
    block = tl.load(work_ptr + 2 * w + 1, mask=inside, other=0)
    return head, segment, block


@triton.jit
def _bounds(cu_q_ptr, cu_k_ptr, segment):
    """First rows of a segment in both packs, and its lengths."""
    begin_q = tl.load(cu_q_ptr + segment)
    begin_k = tl.load(cu_k_ptr + segment)
    len_q = tl.load(cu_q_ptr + segment + 1) - begin_q
    len_k = tl.load(cu_k_ptr + segment + 1) - begin_k
    return begin_q, begin_k, len_q, len_k


@triton.jit
def _first_query(block, len_q, causal, BLOCK_M: tl.constexpr):
    """First row of a block of queries, -1 if there is no such block. Of a causal segment the last
    blocks, which see the most keys, come first."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    number = tl.where(causal != 0, blocks - 1 - block, block)
    return tl.where(block < blocks, number * BLOCK_M, -1)


@triton.jit
def _attend_block(
    q1, q2, acc1, acc2, m_i, l_i, k, v, row, start, end, rows, limit, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys from `row` of the sources k and v on.

    They are the keys from `start` on, short of `end` if MASKED.
    If CAUSAL, key j is seen by row i iff j <= i + limit; else every row sees some key.
    """
    o_n = tl.arange(0, BLOCK_N)
    left = end - start
    k1 = _load_block(k, row, left, 0, D1, D, BLOCK_N, MASKED)
    scores = _dot(q1, tl.trans(k1), UPCAST)
    if D2 > 0:
        k2 = _load_block(k, row, left, D1, D2, D, BLOCK_N, MASKED)
        scores += _dot(q2, tl.trans(k2), UPCAST)
    if CAUSAL:
        columns = start + o_n
        seen = (columns < end)[None, :] & (columns[None, :] <= rows[:, None] + limit)
        scores = tl.where(seen, scores, float("-inf"))
    elif MASKED:
        if left < BLOCK_N:  # most blocks are whole: saves a compare and a select per score
            scores = tl.where((o_n < left)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
    if CAUSAL:  # a row that has seen nothing yet: -inf - -inf would be NaN
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    p = tl.exp2(scores * scale_log2 - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    if not UPCAST:
        p = p.to(q1.dtype)
    v1 = _load_block(v, row, left, 0, D1, D, BLOCK_N, MASKED)
    acc1 = acc1 * alpha[:, None] + _dot(p, v1, UPCAST)
    if D2 > 0:
        v2 = _load_block(v, row, left, D1, D2, D, BLOCK_N, MASKED)
        acc2 = acc2 * alpha[:, None] + _dot(p, v2, UPCAST)
    return acc1, acc2, m_new, l_i


@triton.jit
def _attend(
    q1, q2, acc1, acc2, m_i, l_i, k, v, rows, begin, end, len_k, limit, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key rows [begin, end); key j is seen by row i iff j <= i + limit."""
    for start in range(begin, end, BLOCK_N):
        acc1, acc2, m_i, l_i = _attend_block(
            q1, q2, acc1, acc2, m_i, l_i, k, v, start, start, len_k, rows, limit, scale_log2,
            D, D1, D2, BLOCK_N, MASKED, MASKED, UPCAST,
        )  # fmt: skip
    return acc1, acc2, m_i, l_i


@triton.jit(do_not_specialize=RUN_TIME)
def _packed_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, cu_q_ptr, cu_k_ptr,
    k1_desc, k2_desc, v1_desc, v2_desc, k1_edge, k2_edge, v1_edge, v2_edge,
    num_tokens, num_work, heads, group_size,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, scale, causal,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and lse, one block of rows (FlashAttention-2, algorithm 1)."""
    head, segment, block = _locate(work_ptr, num_work, heads, GROUP)
    if segment < 0:
        return
    begin_q, begin_k, len_q, len_k = _bounds(cu_q_ptr, cu_k_ptr, segment)
    start_m = _first_query(block, len_q, causal, BLOCK_M)
    if start_m < 0:
        return
    first = (begin_q + start_m).to(tl.int64)  # of this block in the pack
    head_k = head // group_size
    o_m = tl.arange(0, BLOCK_M)
    left_q = len_q - start_m

    q1, q2 = _load_rows(
        q_ptr, stride_qn * STEP, stride_qh * STEP, head, first, left_q, BLOCK_M, D, D1, D2
    )  # fmt: skip
    acc1, acc2 = _zeros(BLOCK_M, D1, D2)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    limit = tl.where(causal != 0, len_k - len_q, len_k)
    end = tl.maximum(tl.minimum(len_k, start_m + BLOCK_M + limit), 0)
    # Blocks that every row sees entirely need no mask. The others come first and in halves: their
    # bounds then do not stay in registers through the long loop (128 x 128 spilled otherwise).
    full = tl.maximum(tl.minimum(len_k, start_m + limit + 1), 0) // BLOCK_N * BLOCK_N
    rows = start_m + o_m
    scale_log2 = scale * LOG2E
    k = (k_ptr, stride_kn * STEP, stride_kh * STEP, k1_edge, k2_edge, head_k, begin_k)
    v = (v_ptr, stride_vn * STEP, stride_vh * STEP, v1_edge, v2_edge, head_k, begin_k)
    acc1, acc2, m_i, l_i = _attend(
        q1, q2, acc1, acc2, m_i, l_i, k, v, rows, full, end, len_k, limit, scale_log2,
        D, D1, D2, BLOCK_N // 2, True, UPCAST,
    )  # fmt: skip
    k = (k_ptr, stride_kn * STEP, stride_kh * STEP, k1_desc, k2_desc, head_k, begin_k)
    v = (v_ptr, stride_vn * STEP, stride_vh * STEP, v1_desc, v2_desc, head_k, begin_k)
    acc1, acc2, m_i, l_i = _attend(
        q1, q2, acc1, acc2, m_i, l_i, k, v, rows, 0, full, len_k, limit, scale_log2,
        D, D1, D2, BLOCK_N, False, UPCAST,
    )  # fmt: skip

    blind = l_i == 0.0
    inverse = 1.0 / tl.where(blind, 1.0, l_i)
    acc1 *= inverse[:, None]
    if D2 > 0:
        acc2 *= inverse[:, None]
    _store_rows(out_ptr, acc1, acc2, heads, head, first, left_q, BLOCK_M, D, D1, D2)
    lse = tl.where(blind, float("-inf"), (m_i + tl.log2(tl.where(blind, 1.0, l_i))) * LN2)
    lse_base = lse_ptr + head.to(tl.int64) * num_tokens + first
    tl.store(lse_base + o_m, lse, mask=o_m < left_q)


def grid(num_work: int, heads: int, group: int) -> tuple[int]:
    return (cdiv(num_work, group) * group * heads,)


def in_steps(*tensors: Tensor) -> tuple[int, list[int]]:
    """STEP and, for the kernels, the strides of tokens and heads of tensors `[N, H, D]` in STEPs.

    A STEP is 16 bytes where all strides are multiples of it, else one element. Triton knows of an
    integer whether 16 divides it and no more: it would read heads of 72 (strides of 144 bytes)
    element by element. Strides that take 64 bits stay in elements: products of 32 would overflow.
    """
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    step = 16 // tensors[0].element_size()
    if any(stride % step or stride >= 2**31 for stride in strides):
        return 1, strides
    return step, [stride // step for stride in strides]


def upcast(x: Tensor) -> bool:
    """True for bf16 in the interpreter, whose bf16 arithmetic is wrong."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16


def options(launch: Launch, descriptors: Sequence[object]) -> dict[str, Any]:
    """How Triton shall compile the kernel of a launch with these descriptors."""
    stages = launch.stages(descriptors[0] is not None)
    return {"num_warps": launch.num_warps, "num_stages": stages, "enable_fp_fusion": True}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, work: Tensor | None,
    max_seqlen: int, max_seqlen_k: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `[N, H, D]` and lse `[H, N]`; `work` lists the query blocks of `config.fwd.block_m`."""
    config = config_for(q)
    num_tokens, heads, head_dim = q.shape
    if work is None:
        work = work_list(cu_q, num_tokens, config.fwd.block_m, cu_k.diff())
    out = q.new_empty((num_tokens, heads, head_dim))
    lse = q.new_empty((heads, num_tokens), dtype=torch.float32)
    launch = config.fwd
    if num_tokens == 0 or heads == 0:
        return out, lse
    step, strides = in_steps(q, k, v)
    descs = describe(launch, config, (launch.block_n, launch.block_n // 2), k, v)
    run(
        _packed_attention_fwd_kernel, grid(work.shape[0], heads, launch.group), q.device,
        q, k, v, out, lse, work, cu_q, cu_k, *descs,
        num_tokens, work.shape[0], heads, heads // k.shape[1], *strides, scale, int(causal),
        D=head_dim, D1=config.dim1, D2=config.dim2,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STEP=step, GROUP=launch.group,
        UPCAST=upcast(q), **options(launch, descs),
    )  # fmt: skip
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op packed_attention_bwd."""
    from . import kernels_bwd

    return kernels_bwd.backward(*args)


def aot_cases() -> list[AotCase]:
    """What `sora_kernels.aot` compiles: forward and backward at the launches of every chip."""
    from . import aot_cases as listing

    return listing.aot_cases()
