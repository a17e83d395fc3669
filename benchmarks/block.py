"""One DiT block: ours on packed tokens, against the idiomatic plain block and its torch.compile.

On a CPU 4096 tokens of hidden size 384 (DiT-S); on a GPU 32k tokens of Wan 1.3B's widths. Clips of
one size, so that the plain block is spared all padding and gathering and runs on a dense
``[B, L, D]``. What differs is the fusion alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from model.config import DiTConfig
from model.dit import Block
from sora_kernels import adaln_attention, adaln_mlp, bias_gelu
from sora_kernels.packing import PackedLayout, Rope

from .plain_dit import dense_block, turns_of
from .registry import DTYPES, Case, Context, Inputs, Provider, Run

CONFIG = DiTConfig(width=384, depth=1, heads=6, patch=(1, 1, 1))
# A hidden layer of 8960.
WAN = DiTConfig(
    width=1536, depth=1, heads=12, patch=(1, 1, 1), rope_axes=(44, 42, 42), mlp_ratio=5.8334
)
# (clips, grid of tokens): 256 x 256 images of DiT-S/2, short clips, one long clip.
SHAPES = ((16, (1, 16, 16)), (4, (4, 16, 16)), (1, (4, 32, 32)))
# Clips of 8192 tokens, and one of 81 frames at 480p.
CUDA = ((4, (8, 32, 32)), (1, (21, 30, 52)))


def ours(
    block: Block, x: Tensor, c: Tensor, layout: PackedLayout, rope: Rope, recompute: bool = False
) -> Tensor:
    """``x`` ``[N, D]``, ``c`` ``[clips, D]``. What follows a block is not part of it, so unlike
    in the model its last pass is the residual alone."""
    rows = layout.segment_rows
    shift1, scale1, gate1, shift2, scale2, gate2 = block.rows(c).chunk(6, dim=-1)
    x, h = adaln_attention(
        x, (shift1, scale1, gate1), block.qkv, block.out, layout, rope,
        heads=block.heads, q_weight=block.q_weight, k_weight=block.k_weight, rows=rows,
        next_modulation=(shift2, scale2), recompute=recompute,
    )  # fmt: skip
    found = adaln_mlp(
        x, (shift2, scale2, gate2), block.up, block.mlp_out,
        activation=partial(bias_gelu, bias=block.mlp_in.bias), rows=rows, normed=h,
        recompute=recompute,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found


def inputs(
    config: DiTConfig, clips: int, grid: tuple[int, int, int], dtype: str, device: torch.device
) -> Inputs:
    block = Block(config)
    for p in block.parameters():  # adaLN-Zero starts at zero: timing would see an idle gate
        torch.nn.init.normal_(p, std=0.02 if p.dim() > 1 else 0.1)
    block.to(device, DTYPES[dtype])
    layout = PackedLayout.from_grids([grid] * clips, patch=config.patch, device=device)
    rope = layout.rope(config.rope_axes)
    cos, sin = rope.slice(0, layout.num_tokens // clips).dense()
    return {
        "block": block,
        "x": torch.randn(layout.num_tokens, config.width, device=device).to(DTYPES[dtype]),
        "c": torch.randn(clips, config.width, device=device).to(DTYPES[dtype]),
        "layout": layout,
        "rope": rope,
        "turns": turns_of(cos, sin, compile=False)[None],
        "real_turns": turns_of(cos, sin, compile=True)[None],
    }


def run_ours(given: Inputs, x: Tensor, c: Tensor, recompute: bool = False) -> Tensor:
    return ours(given["block"], x, c, given["layout"], given["rope"], recompute)


def run_plain(
    function: Callable[..., Tensor], turns: str, given: Inputs, x: Tensor, c: Tensor
) -> Tensor:
    dense = x.view(len(c), -1, x.shape[-1])
    return function(given["block"], dense, c[:, None], 0, given[turns], None).view_as(x)


def provider(call: Callable[[Inputs, Tensor, Tensor], Tensor], mode: str) -> Provider:
    """Forward, or forward and backward with the gradients of both inputs and all weights."""

    def build(given: Inputs) -> Run:
        if mode == "fwd":

            def forward() -> object:
                with torch.no_grad():
                    return call(given, given["x"], given["c"])

            return forward
        x, c = (given[name].detach().requires_grad_() for name in ("x", "c"))
        wanted = [x, c, *given["block"].parameters()]
        generator = torch.Generator(device=x.device).manual_seed(1)
        upstream = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return lambda: torch.autograd.grad(call(given, x, c), wanted, upstream)

    return build


def compiled(mode: str) -> Provider:
    def build(given: Inputs) -> Run:
        function = torch.compile(dense_block, dynamic=False)
        return provider(partial(run_plain, function, "real_turns"), mode)(given)

    return build


def block_flops(lengths: Iterable[int], width: int, hidden: int | None = None) -> int:
    """Forward: the five products of a block (24 N D^2 with a hidden layer of 4 D, the default) and
    attention's two (4 L^2 D a segment)."""
    hidden = 4 * width if hidden is None else hidden
    return sum(8 * n * width**2 + 4 * n * width * hidden + 4 * n * n * width for n in lengths)


def cases(context: Context) -> Iterable[Case]:
    on_cuda = context.device == "cuda"
    dtypes = ("bf16",) if on_cuda else ("fp32", "bf16")
    config = WAN if on_cuda else CONFIG
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes = CUDA if on_cuda else SHAPES
    for clips, grid in context.pick(quick=shapes[:1], full=shapes):
        length = grid[0] * grid[1] * grid[2]
        for dtype in dtypes:
            size = DTYPES[dtype].itemsize
            weights = (10 * width**2 + 2 * width * hidden) * size
            flops = block_flops([length] * clips, width, hidden)
            for mode, factor in (("fwd", 1), ("fwd+bwd", 3)):
                extra = {}
                if mode == "fwd+bwd":  # half the memory
                    extra["recompute"] = provider(partial(run_ours, recompute=True), mode)
                yield Case(
                    suite="block",
                    op="dit_block",
                    mode=mode,
                    case=f"{clips}x{length} tokens, D={width}",
                    dtype=dtype,
                    bytes=factor * (2 * clips * length * width * size + weights),
                    flops=factor * flops,
                    inputs=partial(inputs, config, clips, grid, dtype),
                    providers={
                        "sora_kernels": provider(run_ours, mode),
                        **extra,
                        "plain": provider(partial(run_plain, dense_block, "turns"), mode),
                        # The same with rotary embeddings in real numbers, as diffusers has them.
                        "plain_real": provider(partial(run_plain, dense_block, "real_turns"), mode),
                        "compile": compiled(mode),
                    },
                )
