"""qk_norm_rope: norms and pairings of real models, q and k views of one packed QKV projection.

And the joint form: text and video apart, with norms of their own, into one packed q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_joint
from sora_kernels.packing import Grid, PackedLayout, Text

from .registry import DTYPES, Case, Context, Inputs, ahead_of_time, op_cases


@dataclass(frozen=True)
class Shape:
    name: str
    grid: tuple[int, int, int]  # tokens along time, height and width
    heads: int
    width: int
    axes: tuple[int, int, int]
    norm: str
    pairing: str = "interleaved"

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


# DiT-XL's width, beyond the cache; then Wan 1.3B, HunyuanVideo, CogVideoX-5B and Cosmos.
BEYOND_CACHE = Shape("dit-xl", (16, 32, 32), 16, 72, (24, 24, 24), "rms")
SHAPES = (
    BEYOND_CACHE,
    Shape("wan", (4, 32, 32), 12, 128, (44, 42, 42), "rms_full"),
    Shape("hunyuan", (4, 32, 32), 24, 128, (16, 56, 56), "rms"),
    Shape("cogvideox", (4, 32, 32), 48, 64, (16, 24, 24), "layer"),
    Shape("cosmos", (4, 32, 32), 16, 128, (44, 42, 42), "rms", "half"),
)
# A GPU is filled by more: 32,768 tokens each.
CUDA = tuple(replace(shape, grid=(8, 64, 64)) for shape in SHAPES)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str) -> Tensor:
    if norm == "rms_full":
        return F.rms_norm(x.flatten(1), weight.shape, weight, 1e-6).view(x.shape)
    if norm == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def rotate_complex(x: Tensor, turns: Tensor) -> Tensor:
    """Interleaved pairs as complex numbers (Llama, Wan): the fastest eager form by far.

    ``turns`` is complex ``[N, 1, D/2]``. fp32 inside, rounded once.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """The same in real numbers (diffusers), for both pairings: Inductor fuses only this form."""
    if pairing == "interleaved":
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def providers(shape: Shape) -> tuple[Callable[..., object], ...]:
    """Ours, plain PyTorch in the form that is fastest eagerly, and in the one to compile."""

    def ours(q, k, q_weight, k_weight, q_bias, k_bias, rope, cos, sin, turns):  # type: ignore[no-untyped-def]
        return qk_norm_rope(
            q, k, q_weight, k_weight, rope, q_bias=q_bias, k_bias=k_bias,
            norm=shape.norm, pairing=shape.pairing,
        )  # fmt: skip

    def real(q, k, q_weight, k_weight, q_bias, k_bias, rope, cos, sin, turns):  # type: ignore[no-untyped-def]
        q = plain_norm(q, q_weight, q_bias, shape.norm)
        k = plain_norm(k, k_weight, k_bias, shape.norm)
        return tuple(rotate_real(x, cos, sin, shape.pairing) for x in (q, k))

    def as_complex(q, k, q_weight, k_weight, q_bias, k_bias, rope, cos, sin, turns):  # type: ignore[no-untyped-def]
        q = plain_norm(q, q_weight, q_bias, shape.norm)
        k = plain_norm(k, k_weight, k_bias, shape.norm)
        return tuple(rotate_complex(x, turns) for x in (q, k))

    return ours, as_complex if shape.pairing == "interleaved" else real, real


def inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(DTYPES[dtype])

    q, k, _ = randn(shape.tokens, 3, shape.heads, shape.width).unbind(1)
    params = shape.width * (shape.heads if shape.norm == "rms_full" else 1)
    layer = shape.norm == "layer"
    layout = PackedLayout.from_grids([shape.grid], patch=(1, 1, 1), device=device)
    rope = layout.rope(shape.axes)
    cos, sin = rope.dense()  # plain PyTorch keeps a table per token; building it is not timed
    return {
        "q": q,
        "k": k,
        "q_weight": randn(params),
        "k_weight": randn(params),
        "q_bias": randn(params) if layer else None,
        "k_bias": randn(params) if layer else None,
        "rope": rope,
        "cos": cos.unsqueeze(1),
        "sin": sin.unsqueeze(1),
        "turns": torch.complex(cos, sin).unsqueeze(1),
    }


TEXT, HEADS, WIDTH = 256, 24, 128  # HunyuanVideo's text, behind the video and not turned


def joint_inputs(tokens: tuple[int, int, int], dtype: str, device: torch.device) -> Inputs:
    layout = PackedLayout([[Grid(*tokens), Text(TEXT)]], device=device)
    rope = layout.rope((16, 56, 56), theta=256.0)
    cos, sin = (t[: layout.num_grid_tokens, None] for t in rope.dense())

    def projection(n: int) -> tuple[Tensor, ...]:
        packed = torch.randn(n, 3, HEADS, WIDTH, device=device).to(DTYPES[dtype])
        return packed.unbind(1)

    streams = (*projection(layout.num_grid_tokens), *projection(TEXT))
    names = ("q", "k", "v", "text_q", "text_k", "text_v")
    weights = {
        name: torch.randn(WIDTH, device=device).to(DTYPES[dtype])
        for name in ("q_weight", "k_weight", "text_q_weight", "text_k_weight")
    }
    index = (layout.grid_tokens, layout.text_tokens)
    tables = {"rope": rope, "index": index, "cos": cos, "sin": sin}
    return {**dict(zip(names, streams, strict=True)), **weights, **tables}


def joint(  # type: ignore[no-untyped-def]
    q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight,
    rope, index, cos, sin,
):  # fmt: skip
    return qk_norm_rope_joint(
        ((q, k, v), (text_q, text_k, text_v)),
        (q_weight, text_q_weight), (k_weight, text_k_weight), rope, index=index,
    )  # fmt: skip


def plain_joint(  # type: ignore[no-untyped-def]
    q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight,
    rope, index, cos, sin,
):  # fmt: skip
    """Four norms, two rotations and three concatenations, as diffusers has them."""
    q = rotate_real(plain_norm(q, q_weight, None, "rms"), cos, sin, "interleaved")
    k = rotate_real(plain_norm(k, k_weight, None, "rms"), cos, sin, "interleaved")
    text_q = plain_norm(text_q, text_q_weight, None, "rms")
    text_k = plain_norm(text_k, text_k_weight, None, "rms")
    return tuple(torch.cat(pair) for pair in ((q, text_q), (k, text_k), (v, text_v)))


def joint_cases(dtype: str, context: Context) -> Iterable[Case]:
    grid = (8, 64, 64) if context.device.startswith("cuda") else (4, 32, 32)
    tokens = grid[0] * grid[1] * grid[2] + TEXT
    elements = 3 * tokens * HEADS * WIDTH
    size = DTYPES[dtype].itemsize * elements
    yield from op_cases(
        "qk_norm_rope",
        f"hunyuan joint {tokens - TEXT}+{TEXT}x{HEADS}x{WIDTH}",
        dtype,
        inputs=partial(joint_inputs, grid, dtype),
        ours=joint,
        plain=plain_joint,
        peers=ahead_of_time("qk_norm_rope", joint, context),
        bytes={"fwd": 2 * size, "bwd": 8 * size // 3},  # q, k: x, dy -> dx; v: dy -> dx
        flops={"fwd": 14 * elements // 3, "bwd": 24 * elements // 3},
        grads=("q", "k", "v", "text_q", "text_k", "text_v", "q_weight", "k_weight",
               "text_q_weight", "text_k_weight"),
    )  # fmt: skip


def cases(context: Context) -> Iterable[Case]:
    for dtype in context.pick(quick=(), full=("fp32", "bf16"), cuda=("bf16",)):
        yield from joint_cases(dtype, context)
    for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16"), cuda=("bf16",)):
        for shape in context.pick(quick=(BEYOND_CACHE,), full=SHAPES, cuda=CUDA):
            ours, plain, real = providers(shape)
            elements = 2 * shape.tokens * shape.heads * shape.width  # q and k
            size = DTYPES[dtype].itemsize * elements
            grads = ["q", "k", "q_weight", "k_weight"]
            yield from op_cases(
                "qk_norm_rope",
                f"{shape.name} {shape.tokens}x{shape.heads}x{shape.width}",
                dtype,
                inputs=partial(inputs, shape, dtype),
                ours=ours,
                plain=plain,
                compile=real,
                peers=ahead_of_time("qk_norm_rope", ours, context),
                bytes={"fwd": 2 * size, "bwd": 3 * size},  # x -> y; x, dy -> dx
                flops={"fwd": 7 * elements, "bwd": 12 * elements},
                grads=grads + (["q_bias", "k_bias"] if shape.norm == "layer" else []),
            )
