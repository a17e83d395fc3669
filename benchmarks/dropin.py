"""`accelerate` on blocks of diffusers at their real widths: what a user of one call gets.

A block as upstream has it (``plain``), that one compiled (``compile``), after
`sora_kernels.accelerate` (``sora_kernels``) and that compiled (``patched_compile``): inference,
full training and LoRA training (rank 16 on q, k, v, out). Projections, attention and feed-forward
are upstream's in all of them, so what can be gained is what lies between, and it is less the
wider the block. Rows where we lose are shown like the others.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .registry import DTYPES, Case, Context, Inputs, Provider, Run, Unavailable, tensors_of

GRID = (4, 16, 16)
TOKENS, TEXT = GRID[0] * GRID[1] * GRID[2], 128
LORA = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Family:
    """A block of upstream and what it is called with.

    Attributes:
        case: name and size in the table.
        width: of the residual stream.
        block: makes it, with upstream's initial weights.
        arguments: of one call, for a dtype.
        fp32: parts of parameter names that upstream keeps in fp32.
    """

    case: str
    width: int
    block: Callable[[], nn.Module]
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    fp32: tuple[str, ...] = ()


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def wan() -> Family:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = WanRotaryPosEmbed(128, (1, 1, 1), 64)(torch.empty(1, 16, *GRID))
        x, text = randn(1, TOKENS, 1536, dtype=dtype), randn(1, TEXT, 1536, dtype=dtype)
        return x, text, randn(1, 6, 1536, dtype=torch.float32), rotary

    return Family(
        f"Wan 2.1 1.3B, {TOKENS} tokens", 1536,
        lambda: WanTransformerBlock(1536, 8960, 12, cross_attn_norm=True), arguments,
        ("scale_shift_table", "norm1", "norm2", "norm3"),
    )  # fmt: skip


def ltx() -> Family:
    from diffusers.models.transformers.transformer_ltx import (
        LTXVideoRotaryPosEmbed,
        LTXVideoTransformerBlock,
    )

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        rotary = LTXVideoRotaryPosEmbed(2048)(torch.empty(1, TOKENS, 2048), *GRID, (8 / 25, 32, 32))
        x, text = randn(1, TOKENS, 2048, dtype=dtype), randn(1, TEXT, 2048, dtype=dtype)
        return x, text, randn(1, 1, 6 * 2048, dtype=dtype), rotary

    return Family(
        f"LTX-Video 2B, {TOKENS} tokens", 2048,
        lambda: LTXVideoTransformerBlock(2048, 32, 64, 2048), arguments,
    )  # fmt: skip


def cogvideox() -> Family:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        t, h, w = GRID
        rotary = get_3d_rotary_pos_embed(64, ((0, 0), (h, w)), (h, w), t)
        x, text = randn(1, TOKENS, 1920, dtype=dtype), randn(1, TEXT, 1920, dtype=dtype)
        return x, text, randn(1, 512, dtype=dtype), rotary

    return Family(
        f"CogVideoX 2B, {TOKENS}+{TEXT} tokens", 1920,
        lambda: CogVideoXBlock(1920, 30, 64, 512), arguments,
    )  # fmt: skip


def flux() -> Family:
    from diffusers.models.transformers.transformer_flux import (
        FluxPosEmbed,
        FluxSingleTransformerBlock,
    )

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        side = 20
        rows = torch.arange(float(side))
        axes = torch.meshgrid(torch.zeros(1), rows, rows, indexing="ij")
        at = torch.stack(axes, -1).view(-1, 3)
        rotary = FluxPosEmbed(10000, [16, 56, 56])(torch.cat((torch.zeros(TEXT, 3), at)))
        x, text = randn(1, side * side, 3072, dtype=dtype), randn(1, TEXT, 3072, dtype=dtype)
        return x, text, randn(1, 3072, dtype=dtype), rotary

    return Family(
        f"Flux single, 400+{TEXT} tokens", 3072,
        lambda: FluxSingleTransformerBlock(3072, 24, 128), arguments,
    )  # fmt: skip


FAMILIES = (wan, ltx, cogvideox, flux)
#: mode, whether LoRA's weights alone train, operations in forwards
WAYS = (("fwd", False, 1), ("fwd+bwd", False, 3), ("fwd+bwd", True, 2))


def made(make: Callable[[], Family], dtype: str, lora: bool) -> Inputs:
    """The block twice, with the same weights; all of them train, or LoRA's alone."""
    from sora_kernels import accelerate

    family = make()
    block = family.block()
    torch.manual_seed(0)
    for name, p in block.named_parameters():
        if p.ndim > 1:  # tables and gates start at zero in some families: timing would see none
            nn.init.normal_(p, std=0.02)
        if not any(part in name for part in family.fp32):
            p.data = p.data.to(DTYPES[dtype])
    if lora:
        if importlib.util.find_spec("peft") is None:
            raise Unavailable("peft is not installed")
        from peft import LoraConfig, inject_adapter_in_model

        block.requires_grad_(False)
        config = LoraConfig(r=16, target_modules=list(LORA), init_lora_weights=False)
        block = inject_adapter_in_model(config, block)
        for name, p in block.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(DTYPES[dtype])
    ours = copy.deepcopy(block)
    accelerate(ours, strict=True)
    return {"plain": block, "ours": ours, "arguments": family.arguments(DTYPES[dtype])}


def provider(name: str, mode: str, compile: bool = False) -> Provider:
    def build(given: Inputs) -> Run:
        block = given[name]
        call: Callable[..., Any] = block
        if compile:
            call = torch.compile(block, dynamic=False)
        x, *rest = given["arguments"]
        if mode == "fwd":

            def forward() -> object:
                with torch.no_grad():
                    return call(x, *rest)

            return forward
        x = x.detach().requires_grad_()  # the block before trains too
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]

        def both() -> object:
            outputs = [y for y in tensors_of(call(x, *rest)) if y.requires_grad]
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

        return both

    return build


def work(family: Family) -> tuple[int, int]:
    """(parameters, floating-point operations of a forward), counted without memory."""
    with torch.device("meta"):
        count = sum(p.numel() for p in family.block().parameters() if p.ndim > 1)
    return count, 2 * count * TOKENS + 4 * TOKENS**2 * family.width


def cases(context: Context) -> Iterable[Case]:
    if importlib.util.find_spec("diffusers") is None:
        return
    for make in FAMILIES[:1] if context.quick else FAMILIES:
        family = make()
        parameters, flops = work(family)
        for dtype in context.pick(quick=("fp32",), full=("fp32", "bf16")):
            size = DTYPES[dtype].itemsize
            for mode, lora, factor in WAYS:
                yield Case(
                    suite="dropin",
                    op="accelerate",
                    mode=mode,
                    case=family.case + ", LoRA" * lora,
                    dtype=dtype,
                    bytes=factor * size * (parameters + 2 * TOKENS * family.width),
                    flops=factor * flops,
                    inputs=partial(inputs, make, dtype, lora),
                    providers={
                        "sora_kernels": provider("ours", mode),
                        "plain": provider("plain", mode),
                        "compile": provider("plain", mode, compile=True),
                        "patched_compile": provider("ours", mode, compile=True),
                    },
                )


def inputs(make: Callable[[], Family], dtype: str, lora: bool, device: torch.device) -> Inputs:
    given = made(make, dtype, lora)
    if device.type == "cpu":
        return given

    def move(value: Any) -> Any:
        if isinstance(value, (nn.Module, Tensor)):
            return value.to(device)
        return type(value)(move(v) for v in value) if isinstance(value, (list, tuple)) else value

    return {name: move(value) for name, value in given.items()}
