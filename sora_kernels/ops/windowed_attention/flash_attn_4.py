"""Windowed attention by the block sparsity of FlashAttention-4, forward and backward.

The pack is one sequence of N tokens; `block_sparse` holds what is read of it. Written against
flash-attn-4 4.0.0b36 and called as PyTorch's FlexAttention calls it, by ``_flash_attn_fwd`` and
``_flash_attn_bwd`` of ``flash_attn.cute.interface``: raw ops around these two make the calls opaque
to torch.compile, so that nothing breaks the graph.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import backend
from .block_sparse import Block, BlockTensors, block_tensors

if TYPE_CHECKING:
    from ...packing import PackedLayout
    from ...packing.windows import Window

_OP = "windowed_attention_fa4"
_MAJORS = (9, 10, 11)


def why_not(chip: tuple[int, int], deterministic_training: bool) -> str | None:
    """What block sparsity asks for beyond the dense calls of the library."""
    if chip[0] not in _MAJORS:
        return f"its block sparsity has no backward on compute capability {chip[0]}.{chip[1]}"
    if deterministic_training and chip[0] == 9:
        return "its block-sparse backward is not deterministic on compute capability 9.0"
    return None


def block_of(chip: tuple[int, int]) -> Block:
    """Queries and keys of a block: what the kernels of the chip step by, forward and backward.

    On Hopper 128 queries and keys; from Blackwell on two query tiles of 128 are in flight.
    """
    return (128, 128) if chip[0] == 9 else (256, 128)


def tensors_for(layout: PackedLayout, window: Window, chip: tuple[int, int]) -> BlockTensors:
    """The block tensors of a chip, cached on the layout."""
    return block_tensors(layout, window, block_of(chip))


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: Window, scale: float,
    chip: tuple[int, int], deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[N, H, D]`, lse fp32 `[H, N]`), differentiable in both."""
    made = tensors_for(layout, window, chip)
    block = list(block_of(chip))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # torch.compile refuses one tensor in two places of a Function.
        if torch.compiler.is_compiling():
            k = k.view_as(k) if k is q else k
            v = v.view_as(v) if v is k or v is q else v
        lists = (*made.by_query, *made.by_key, made.turn_partial, made.turn_full)
        out, lse = _BlockSparse.apply(q, k, v, made.places, *lists, block, scale, deterministic)
        return out, lse
    return _raw("fwd")(q, k, v, made.places, list(made.by_query), block, scale)


def _raw(direction: str) -> Any:
    return getattr(torch.ops.sora_kernels, f"{_OP}_{direction}").default


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        places, *lists, block, scale, deterministic = args
        out, lse = _raw("fwd")(q, k, v, places, lists[:4], block, scale)
        ctx.statics = (block, scale, deterministic)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, places, *lists[4:])
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, places, *lists = ctx.saved_tensors
        rest = (None,) * 14
        if dout is None and dlse is None:
            return None, None, None, *rest
        if dout is None:
            dout = torch.zeros_like(out)
        found = _raw("bwd")(dout, dlse, q, k, v, out, lse, places, lists, *ctx.statics)
        wanted = zip(ctx.needs_input_grad, found, strict=False)
        return *(grad if need else None for need, grad in wanted), *rest


# --- the library's calls ------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, by_query: list[Tensor], block: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0:
        return _fake_forward(q)
    library = importlib.import_module("flash_attn.cute.interface")
    found = library._flash_attn_fwd(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0),
        softmax_scale=scale,
        mask_mod=mask_function(),
        block_sparse_tensors=_sparse_tensors(by_query, block),
        return_lse=True,
        aux_tensors=[places],
    )  # fmt: skip
    return found[0].squeeze(0), found[1].squeeze(0)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    places: Tensor, by_key: list[Tensor], block: list[int], scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0:
        return _fake_backward(dout, dlse, q, k, v)
    library = importlib.import_module("flash_attn.cute.interface")
    # The gradients are made here: of views into one packed tensor the library would allocate
    # gradients with the strides of the views.
    dq, dk, dv = _fake_backward(dout, dlse, q, k, v)
    library._flash_attn_bwd(
        *(x.unsqueeze(0) for x in (q, k, v, out, dout, lse)),
        softmax_scale=scale,
        deterministic=deterministic,
        dq=dq.unsqueeze(0), dk=dk.unsqueeze(0), dv=dv.unsqueeze(0),
        mask_mod=mask_function(),
        aux_tensors=[places],
        block_sparse_tensors=_sparse_tensors(by_key, block, deterministic),
        dlse=None if dlse is None else dlse.unsqueeze(0),
    )  # fmt: skip
    return dq, dk, dv


def _sparse_tensors(lists: list[Tensor], block: list[int], deterministic: bool = False) -> Any:
    """The library's tuple: one batch, and one head that stands for all."""
    module = importlib.import_module("flash_attn.cute.block_sparsity")
    partial_count, partial, full_count, full = map(_once, lists[:4])
    order: dict[str, Any] = {}
    if deterministic:
        order = dict(
            zip(("dq_write_order", "dq_write_order_full"), map(_once, lists[4:]),
                strict=True)
        )  # fmt: skip
        # Ascending key blocks; newer releases call the switch by another name.
        fields = module.BlockSparseTensorsTorch._fields
        order["dq_kv_order" if "dq_kv_order" in fields else "spt"] = False
    return module.BlockSparseTensorsTorch(
        mask_block_cnt=partial_count, mask_block_idx=partial, full_block_cnt=full_count,
        full_block_idx=full, block_size=(block[0], block[1]), **order,
    )  # fmt: skip


def _once(x: Tensor) -> Tensor:
    return x.unsqueeze(0).unsqueeze(0)


@functools.cache
def mask_function() -> Any:
    """`block_sparse.visible` in the library's language, where places are its only aux tensor."""
    cutlass: Any = importlib.import_module("cutlass")
    cute: Any = importlib.import_module("cutlass.cute")
    ssa = importlib.import_module("flash_attn.cute.utils").scalar_to_ssa
    i32 = cutlass.Int32

    def seen(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        places = aux_tensors[0]
        i, j = query[0], key[0]
        layer, row, column = ssa(places[0, j], i32), ssa(places[1, j], i32), ssa(places[2, j], i32)
        whole = (layer >= ssa(places[3, i], i32)) & (layer < ssa(places[4, i], i32))
        along_t = (layer >= ssa(places[5, i], i32)) & (layer < ssa(places[6, i], i32))
        along_h = (row >= ssa(places[7, i], i32)) & (row < ssa(places[8, i], i32))
        along_w = (column >= ssa(places[9, i], i32)) & (column < ssa(places[10, i], i32))
        return whole | (along_t & along_h & along_w)

    return cute.jit(seen)


# --- registration -------------------------------------------------------------------------------


def _fake_forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor places, Tensor[] by_query, SymInt[] block, "
    "float scale) -> (Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor places, Tensor[] by_key, SymInt[] block, float scale, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
}
for _direction, _kernel, _fake in (
    ("fwd", _forward, _fake_forward), ("bwd", _backward, _fake_backward),
):  # fmt: skip
    _name = f"{_OP}_{_direction}"
    backend.define(_name + _SCHEMAS[_direction])
    backend.fake(_name, _fake)
    backend.implement(_name, "CUDA", _kernel)
    backend.implement(_name, "CPU", _kernel)  # where stand-ins of the library run, in tests
    backend.guard_autograd(_name)
