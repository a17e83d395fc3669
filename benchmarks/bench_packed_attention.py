"""packed_attention: mixes of clips of different sizes, and equal ones, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.packed_attention import packed_attention
from sora_kernels.ops.packed_attention.config import choose_config, forced_descriptors
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN
from sora_kernels.packing import PackedLayout, Text

from .registry import DTYPES, Case, Context, Inputs, Run, Unavailable, op_cases


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    heads: int
    width: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def case(self) -> str:
        return f"{self.name} {len(self.lengths)} segments {self.tokens}x{self.heads}x{self.width}"


def mixed(tokens: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths between the two, log-uniform, that sum to `tokens`; the same in every run."""
    draw = random.Random(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, round(shortest * (longest / shortest) ** draw.random())))
    return tuple(lengths)


QUICK = (Shape("one", (1024,), 6, 64), Shape("mixed", mixed(3072, 64, 1024), 6, 64))
CPU = (
    QUICK[1],
    Shape("equal", (256,) * 16, 6, 64),
    Shape("one", (4096,), 6, 64),
    Shape("dit-xl mixed", mixed(4096, 64, 2048), 16, 72),
)
CUDA = (
    Shape("one", (8192,), 24, 128),
    Shape("one", (32768,), 24, 128),
    Shape("one", (32768,), 12, 64),
    Shape("equal", (8192,) * 8, 24, 128),
    Shape("mixed", mixed(131072, 1024, 32768), 24, 128),
    Shape("dit-xl mixed", mixed(65536, 256, 16384), 16, 72),
)


def inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    shapes = (shape.tokens, 3, shape.heads, shape.width)
    q, k, v = torch.randn(shapes, device=device).to(DTYPES[dtype]).unbind(1)
    layout = PackedLayout([[Text(n)] for n in shape.lengths], device=device)
    return {"q": q, "k": k, "v": v, "layout": layout}


def ours(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Any:
    return packed_attention(q, k, v, layout, library=OWN)


def per_segment(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    """Plain PyTorch: one dense SDPA call for each segment. Nothing is padded or masked."""
    pieces = []
    for segment in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in segment)
        pieces.append(F.scaled_dot_product_attention(q_s, k_s, v_s)[0].transpose(0, 1))
    return torch.cat(pieces)


def padded(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    """Plain PyTorch: one batch, padded to the longest segment, with a mask of the padded keys."""
    q_p, k_p, v_p = (
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    )
    used = (
        torch.arange(max(lengths), device=q.device)
        < torch.tensor(lengths, device=q.device)[:, None]
    )
    out = F.scaled_dot_product_attention(q_p, k_p, v_p, attn_mask=used[:, None, None])
    return out.transpose(1, 2)[used]


def by_library(
    library: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: Any = None
) -> Any:
    """A library forced by name, its backward as fast as it can."""
    try:
        return packed_attention(
            q, k, v, layout, window=window, library=library, deterministic=False
        )
    except ValueError as error:  # says which library cannot run what, and why
        raise Unavailable(str(error)) from None


def with_pointers(case: Case, width: int) -> Case:
    """Our kernel once more as provider ``pointers``: without tensor descriptors, on a GPU that
    reads by them."""
    own = case.providers["sora_kernels"]

    def build(inputs: Inputs) -> Run:
        capability = torch.cuda.get_device_capability()
        config = choose_config(width, DTYPES[case.dtype], capability)
        launches = (config.fwd,) if case.mode == "fwd" else (config.dq, config.dkv)
        if not any(launch.descriptors for launch in launches):
            raise Unavailable(
                f"on sm_{capability[0]}{capability[1]} sora_kernels reads by pointers"
            )

        def run() -> object:
            with forced_descriptors(False):
                return timed()

        with forced_descriptors(False):
            timed = own(inputs)
        return run

    return replace(case, providers={**case.providers, "pointers": build})


def cases(context: Context) -> Iterable[Case]:
    on_cuda = context.device == "cuda"
    dtypes = ("bf16",) if on_cuda else ("fp32", "bf16")
    for shape in context.pick(quick=QUICK, full=CUDA if on_cuda else CPU):
        for dtype in context.pick(quick=dtypes[:1], full=dtypes):
            size = shape.tokens * shape.heads * shape.width * DTYPES[dtype].itemsize
            flops = 4 * sum(n * n for n in shape.lengths) * shape.heads * shape.width
            plain = partial(per_segment, shape.lengths)
            peers = {name: partial(by_library, name) for name in LIBRARIES}
            if not context.quick and shape.name != "one" and shape.tokens <= 8192:
                peers["padded"] = partial(padded, shape.lengths)
            made = op_cases(
                "packed_attention",
                shape.case,
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=ours,
                plain=plain,
                compile=False,  # the loop is library calls: there is nothing to fuse
                peers=peers,
                bytes={"fwd": 4 * size, "bwd": 8 * size},
                flops={"fwd": flops, "bwd": flops * 5 // 2},
                grads=("q", "k", "v"),
            )
            yield from (with_pointers(case, shape.width) for case in made) if on_cuda else made
