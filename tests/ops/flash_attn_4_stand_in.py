"""What `windowed_attention.flash_attn_4` calls of flash-attn-4 4.0.0b36, in plain PyTorch.

The signatures, the fields of the tuple and the demands on shapes are those of that release; the
results are computed in fp64 from the lists and the mask function alone, as its kernels read them.
"""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

VERSION = "4.0.0b36"


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def _lists(tensors: Any, rows: int, columns: int) -> list[tuple[int, int, bool, int]]:
    """(row, column, whole, place in its list) of all that is listed, with the library's checks."""
    listed = []
    for whole, count, index in (
        (False, tensors.mask_block_cnt, tensors.mask_block_idx),
        (True, tensors.full_block_cnt, tensors.full_block_idx),
    ):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape == (1, 1, rows)
        assert index.shape[:3] == (1, 1, rows) and index.shape[3] <= columns
        assert index.stride(-1) == 1
        for row, number in enumerate(count[0, 0].tolist()):
            listed += [
                (row, column, whole, place)
                for place, column in enumerate(index[0, 0, row, :number].tolist())
            ]
    return listed


def _mask(
    tensors: Any, n: int, mask_mod: Any, aux: list[Tensor], block: tuple[int, int], by_key: bool
) -> Tensor:
    """bool `[N, N]`. The function is asked about whole blocks, past the end of the sequence too."""
    assert tensors.block_size == block
    sides = [-(-n // size) for size in block]
    whole_n = [blocks * size for blocks, size in zip(sides, block, strict=True)]
    mask = torch.zeros(whole_n, dtype=torch.bool)
    rows, columns = sides[::-1] if by_key else sides
    for row, column, whole, _ in _lists(tensors, rows, columns):
        i, j = (column, row) if by_key else (row, column)
        q = torch.arange(i * block[0], (i + 1) * block[0])
        k = torch.arange(j * block[1], (j + 1) * block[1])
        zero = torch.zeros(1, dtype=torch.int64)
        seen = mask_mod([zero], [zero], [q[:, None]], [k[None]], None, aux)
        mask[q[:, None], k] = True if whole else seen
    return mask[:n, :n]


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor, scale: float, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1) if lse is None else lse
    return torch.exp(scores - lse[..., None]), lse


def make(block: tuple[int, int], calls: list[str]) -> tuple[Any, Any]:
    """`_flash_attn_fwd` and `_flash_attn_bwd` of a chip with this block size."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None,
        v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        assert q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == 1 and return_lse
        assert cu_seqlens_q is None and not causal and out is None and lse is None
        calls.append("forward")
        n, group = q.shape[1], q.shape[2] // k.shape[2]
        mask = _mask(block_sparse_tensors, n, mask_mod, aux_tensors, block, False)
        wide = [x.double().repeat_interleave(g, 2) for x, g in ((q, 1), (k, group), (v, group))]
        p, found = _probabilities(wide[0], wide[1], mask, softmax_scale)
        result = torch.einsum("bhnm,bmhd->bnhd", p, wide[2])
        return result.to(q.dtype), found.float(), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
        block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        assert out.shape == dout.shape == q.shape and lse.shape == (1, q.shape[2], q.shape[1])
        assert lse.dtype == torch.float32 and not causal and cu_seqlens_q is None
        calls.append("deterministic backward" if deterministic else "backward")
        n, heads, group = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
        tensors = block_sparse_tensors
        if deterministic:
            _check_turns(tensors, n, block)
        mask = _mask(tensors, n, mask_mod, aux_tensors, block, True)
        wide = [x.double().repeat_interleave(g, 2) for x, g in ((q, 1), (k, group), (v, group))]
        p, _ = _probabilities(wide[0], wide[1], mask, softmax_scale, lse.double())
        grad = dout.double()
        dp = torch.einsum("bnhd,bmhd->bhnm", grad, wide[2])
        delta = torch.einsum("bnhd,bnhd->bhn", grad, out.double())
        ds = p * (dp - (delta if dlse is None else delta - dlse.double())[..., None])
        dq.copy_(torch.einsum("bhnm,bmhd->bnhd", ds, wide[1]) * softmax_scale)
        for given, found in (
            (dk, torch.einsum("bhnm,bnhd->bmhd", ds, wide[0]) * softmax_scale),
            (dv, torch.einsum("bhnm,bnhd->bmhd", p, grad)),
        ):
            given.copy_(found.unflatten(2, (heads, group)).sum(3))
        return dq, dk, dv

    return _flash_attn_fwd, _flash_attn_bwd


def _check_turns(tensors: Any, n: int, block: tuple[int, int]) -> None:
    """A query block waits until `turn` key blocks have added to it: each number once, no gaps."""
    assert tensors.spt is False
    turns: dict[int, list[int]] = {}
    for key, query, whole, place in _lists(tensors, -(-n // block[1]), -(-n // block[0])):
        order = tensors.dq_write_order_full if whole else tensors.dq_write_order
        turns.setdefault(query, []).append(int(order[0, 0, key, place]))
    assert all(sorted(taken) == list(range(len(taken))) for taken in turns.values())


def install(monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]) -> list[str]:
    """Puts the modules in place; returns the list that calls are noted in."""
    calls: list[str] = []
    forward, backward = make(block, calls)
    contents: dict[str, dict[str, Any]] = {
        "cutlass": {"Int32": int},
        "cutlass.cute": {"jit": lambda function: function},
        "flash_attn": {"__version__": VERSION},
        "flash_attn.cute": {},
        "flash_attn.cute.utils": {"scalar_to_ssa": lambda value, dtype: value},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "flash_attn.cute.interface": {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls
