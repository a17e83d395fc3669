"""``python -m benchmarks.memory``: bytes that autograd keeps from forward to backward.

Counted where autograd hands them over (`torch.autograd.graph.saved_tensors_hooks`), each storage
once. ``inputs`` are tensors that the caller made and often keeps anyway; ``own`` is everything
else, what the op adds to the memory of a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import (
    PackedLayout,
    RowMap,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    packed_attention,
    qk_norm_rope,
)

from . import block, dropin
from .plain_dit import gated, modulate, norm, rotate, turns_of
from .registry import DTYPES, Inputs, tensors_of

CLIPS, LENGTH = 8, (2, 16, 16)  # clips of 512 tokens
HEADS, HEAD_DIM = 16, 72  # DiT-XL
AXES = (24, 24, 24)

Call = Callable[[Inputs], object]


def saved_bytes(call: Call, given: Inputs) -> dict[str, int]:
    """Runs ``call`` on leaves made of ``given`` and counts what autograd kept of it."""
    leaves = {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    kept: dict[int, Tensor] = {}  # alive until the end, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = tensors_of(call(leaves))
    theirs = {
        t.untyped_storage().data_ptr() for value in leaves.values() for t in tensors_in(value)
    }
    counted = {"inputs": 0, "own": 0}
    for address, tensor in kept.items():
        counted["inputs" if address in theirs else "own"] += tensor.untyped_storage().nbytes()
    del result
    return counted


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of one input: itself, a module's parameters, or the fields of an object."""
    if isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers()]
    found = tensors_of(value)
    for part in vars(value).values() if hasattr(value, "__dict__") else ():
        found += [part] if isinstance(part, Tensor) else []
    return found


def inputs(dtype: str) -> Inputs:
    """What every op of a block reads: the stream, two branches, q, k, v, and the modulation."""
    layout = PackedLayout.from_grids([LENGTH] * CLIPS, patch=(1, 1, 1))
    tokens, width = layout.num_tokens, HEADS * HEAD_DIM
    rope = layout.rope(AXES)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPES[dtype])

    return {
        **{name: randn(tokens, width) for name in ("x", "attn", "mlp")},
        **{name: randn(tokens, HEADS, HEAD_DIM) for name in ("q", "k", "v")},
        **{name: randn(HEAD_DIM) for name in ("q_weight", "k_weight")},
        **{name: randn(CLIPS, width) for name in ("s1", "c1", "g1", "s2", "c2", "g2")},
        "layout": layout,
        "rope": rope,
        "turns": turns_of(*rope.dense(), compile=False),
    }


def rows(v: Inputs) -> RowMap:
    found: RowMap = v["layout"].segment_rows
    return found


def batch(x: Tensor) -> Tensor:
    return x.unflatten(0, (CLIPS, -1))


def qk_ours(v: Inputs) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(v["q"], v["k"], v["q_weight"], v["k_weight"], v["rope"])


def qk_plain(v: Inputs) -> tuple[Tensor, Tensor]:
    def one(name: str) -> Tensor:
        normed = F.rms_norm(v[name], (HEAD_DIM,), v[f"{name}_weight"], 1e-6)
        return rotate(normed, v["turns"])

    return one("q"), one("k")


def attention_plain(v: Inputs, q: Tensor, k: Tensor) -> Tensor:
    q, k, value = (batch(t).transpose(1, 2) for t in (q, k, v["v"]))
    return F.scaled_dot_product_attention(q, k, value).transpose(1, 2).flatten(0, 1)


def plain_norm(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    return modulate(norm(batch(x)), s[:, None], c[:, None]).flatten(0, 1)


def plain_gate(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return gated(batch(x), batch(y), g[:, None]).flatten(0, 1)


def plain_pair(v: Inputs) -> tuple[Tensor, Tensor]:
    x = plain_gate(v["x"], v["attn"], v["g1"])
    return x, plain_norm(x, v["s2"], v["c2"])


def sandwich_plain(v: Inputs) -> Tensor:
    normed = F.rms_norm(v["attn"], v["attn"].shape[-1:], eps=1e-6)
    return plain_gate(v["x"], normed, torch.tanh(v["g1"]))


def ours_pair(v: Inputs) -> tuple[Tensor, Tensor]:
    return gate_residual_norm_modulate(v["x"], v["attn"], v["g1"], v["s2"], v["c2"], rows=rows(v))


def chain_ours(v: Inputs) -> tuple[object, ...]:
    """All ops of a block in its order. The projections between them are left out: what they save
    is the same either way, so their results are inputs here."""
    h = norm_modulate(v["x"], v["s1"], v["c1"], rows=rows(v))
    o = packed_attention(*qk_ours(v), v["v"], v["layout"])
    x, h2 = ours_pair(v)
    return h, o, h2, gate_residual(x, v["mlp"], v["g2"], rows=rows(v))


def chain_plain(v: Inputs) -> tuple[object, ...]:
    h = plain_norm(v["x"], v["s1"], v["c1"])
    o = attention_plain(v, *qk_plain(v))
    x, h2 = plain_pair(v)
    return h, o, h2, plain_gate(x, v["mlp"], v["g2"])


CHAIN = "ops of a DiT block"
#: op -> ours, plain
CALLS: dict[str, tuple[Call, Call]] = {
    "norm_modulate": (
        lambda v: norm_modulate(v["x"], v["s1"], v["c1"], rows=rows(v)),
        lambda v: plain_norm(v["x"], v["s1"], v["c1"]),
    ),
    "gate_residual": (
        lambda v: gate_residual(v["x"], v["attn"], v["g1"], rows=rows(v)),
        lambda v: plain_gate(v["x"], v["attn"], v["g1"]),
    ),
    "gate_residual, tanh and rms": (
        lambda v: gate_residual(v["x"], v["attn"], v["g1"], rows=rows(v), tanh=True, norm="rms"),
        sandwich_plain,
    ),
    "gate_residual_norm_modulate": (ours_pair, plain_pair),
    "qk_norm_rope": (qk_ours, qk_plain),
    "packed_attention": (
        lambda v: packed_attention(v["q"], v["k"], v["v"], v["layout"]),
        lambda v: attention_plain(v, v["q"], v["k"]),
    ),
    CHAIN: (chain_ours, chain_plain),
}


def measure(
    dtypes: Sequence[str] = ("fp32", "bf16"), only: str | None = None, dropins: bool = False
) -> list[Any]:
    """A row per op and dtype, then the whole block of `benchmarks.block` with its projections; and
    with ``dropins`` blocks of diffusers before and after `accelerate`."""
    found = []
    for dtype in dtypes:
        made = inputs(dtype)
        todo: list[tuple[str, Inputs, Call, Call]] = [(op, made, *c) for op, c in CALLS.items()]
        if only is None:
            whole = block.inputs(block.CONFIG, 4, (4, 16, 16), dtype, torch.device("cpu"))
            name = f"DiT block, D={block.CONFIG.width}"
            todo.append((name, whole, partial(block_ours, recompute=False), block_plain))
            todo.append((f"{name}, recompute", whole, block_ours, block_plain))
        blocks = dropin_blocks(dtype) if dropins and only is None else ()
        for op, given, ours, plain in chain(todo, blocks):
            if only not in (None, op):
                continue
            kept, plain_kept = saved_bytes(ours, given), saved_bytes(plain, given)
            found.append({"op": op, "dtype": dtype, "ours": kept, "plain": plain_kept})
    return found


def dropin_blocks(dtype: str) -> Iterator[tuple[str, Inputs, Call, Call]]:
    """Blocks of diffusers after `accelerate` and as they are, under LoRA training, one by one."""
    for make in dropin.FAMILIES:
        given = dropin.made(make, dtype, True)
        x, *rest = given["arguments"]
        v = {"x": x, "ours": given["ours"], "plain": given["plain"]}
        name = f"{make().case.split(',')[0]}, LoRA"
        calls = [partial(dropin_call, which, rest) for which in ("ours", "plain")]
        yield name, v, calls[0], calls[1]


def dropin_call(which: str, rest: Sequence[Any], v: Inputs) -> object:
    return v[which](v["x"], *rest)


def block_ours(v: Inputs, recompute: bool = True) -> Tensor:
    return block.run_ours(v, v["x"], v["c"], recompute)


def block_plain(v: Inputs) -> Tensor:
    return block.run_plain(block.dense_block, "turns", v, v["x"], v["c"])


def show(found: Iterable[dict[str, Any]]) -> None:
    print(f"{'MB kept for the backward':32}{'ours: inputs':>14}{'own':>9}{'plain: inputs':>15}"
          f"{'own':>9}{'plain / ours':>14}")  # fmt: skip
    for row in found:
        ours, plain = row["ours"], row["plain"]
        numbers = [ours["inputs"], ours["own"], plain["inputs"], plain["own"]]
        mb = [f"{n / 1e6:.2f}" for n in numbers]
        ratio = sum(plain.values()) / sum(ours.values())
        name = f"{row['op']} {row['dtype']}"
        print(f"{name:32}{mb[0]:>14}{mb[1]:>9}{mb[2]:>15}{mb[3]:>9}{ratio:>14.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Bytes kept from forward to backward."
    )
    parser.add_argument("--json", metavar="F", help="where to write the rows")
    parser.add_argument(
        "--dropin", action="store_true", help="blocks of diffusers too (needs diffusers and peft)"
    )
    options = parser.parse_args(argv)
    target = Path(options.json) if options.json else None
    if target and (target.is_dir() or not os.access(target.parent, os.W_OK)):
        print(f"benchmarks.memory: --json: cannot write {target}", file=sys.stderr)
        return 2
    found = measure(dropins=options.dropin)
    if target:
        beside = target.with_name(target.name + ".part")
        beside.write_text(json.dumps({"schema": 1, "rows": found}, indent=1) + "\n")
        beside.replace(target)
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
