"""`accelerate` on blocks of diffusers at their real widths: what a user of one call gets.

A block as upstream has it (``plain``), that one compiled, as `compile_repeated_blocks` compiles it
(``compile``), after `sora_kernels.accelerate` (``sora_kernels``) and that compiled
(``patched_compile``): inference, LoRA training (rank 16 on q, k, v, out) and full training.
Projections, attention and feed-forward are upstream's in all of them, so what can be gained is what
lies between, and it is less the wider the block. Rows where we lose are shown like the others.

The op of a case is its family: ``--only Wan`` or ``--only "PixArt|DiT"`` measures parts, whose
reports `benchmarks.readme` puts together. Memory is the peak of what torch's allocator handed out
during one call: activations, results and gradients, not the weights and inputs that were there
before (`sora_kernels.bench.memory`).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .dropin_blocks import FAMILIES, Family
from .registry import (
    DTYPES,
    TOLERANCE,
    Case,
    Context,
    Inputs,
    Provider,
    Run,
    Unavailable,
    tensors_of,
)
from .runner import Disagreement

LORA = ("to_q", "to_k", "to_v", "to_out.0", "proj_out")
#: mode, whether LoRA's weights alone train, operations in forwards
WAYS = (("fwd", False, 1), ("fwd+bwd", True, 2), ("fwd+bwd", False, 3))
# The 2x rule in a half format, by the norm of each result: at most so many times the error that
# upstream itself has against fp32, and an ulp.
FACTOR, ULP = {"fwd": 2, "fwd+bwd": 3}, 2.0**-8


def made(make: Callable[[], Family], dtype: str, lora: bool) -> Inputs:
    """The block twice, around the same weights; all of them train, or LoRA's alone."""
    from sora_kernels import accelerate

    family = make()
    block = family.block().eval()  # DiT drops labels at random in training
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
    ours = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    accelerate(ours, strict=True)
    given = family.arguments(DTYPES[dtype])
    return {"plain": block, "ours": ours, "arguments": given, "streams": family.streams}


def call_of(block: Callable[..., Any], module: nn.Module, given: Inputs, mode: str) -> Run:
    """One step: the forward alone, or with gradients of what trains and of the streams, whose
    blocks before train too."""
    arguments = list(given["arguments"])
    if mode == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return block(*arguments)

        return forward
    streams = [a.detach().requires_grad_() for a in arguments[: given["streams"]]]
    rest = arguments[len(streams) :]
    wanted = [*streams, *(p for p in module.parameters() if p.requires_grad)]

    def both() -> object:
        outputs = [y for y in tensors_of(block(*streams, *rest)) if y.requires_grad]
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

    return both


def provider(name: str, mode: str, compile: bool = False) -> Provider:
    def build(given: Inputs) -> Run:
        block = given[name]
        call = torch.compile(block, dynamic=False) if compile else block
        run = call_of(call, block, given, mode)
        check(name + ", compiled" * compile, run(), given, mode)
        return run

    return build


def check(name: str, result: object, given: Inputs, mode: str) -> None:
    """Refuses a result that is too far from upstream's, which comes first and sets the measure: of
    a half-precision one that is the 2x rule against an fp32 run of upstream's block."""
    wide_already = given["arguments"][0].dtype is torch.float32
    if "exact" not in given and wide_already:
        given["exact"] = [t.clone() for t in tensors_of(result)]
        given["upstream"] = [0.0] * len(given["exact"])
        return
    if "exact" not in given:
        wide = copy.deepcopy(given["plain"]).float()
        arguments = tuple(widened(a) for a in given["arguments"])
        run = call_of(wide, wide, {**given, "arguments": arguments}, mode)
        given["exact"] = tensors_of(run())
        given["upstream"] = errors(tensors_of(result), given["exact"])
        return
    found = errors(tensors_of(result), given["exact"])
    if len(found) != len(given["upstream"]):
        raise Disagreement(f"{name}: {len(found)} results, upstream has {len(given['upstream'])}")
    for i, (error, upstream) in enumerate(zip(found, given["upstream"], strict=True)):
        allowed = FACTOR[mode] * upstream + (TOLERANCE["fp32"] if wide_already else ULP)
        if not error <= allowed:
            raise Disagreement(
                f"{name}: result {i} differs from upstream in fp32 by {error:.2e} (relative L2), "
                f"upstream itself by {upstream:.2e}, allowed is {allowed:.2e}"
            )


def errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative L2 distances; a result that is almost zero counts by the largest one, such as the
    gradient of a key's bias, which a softmax makes nothing but rounding."""
    norms = [float(e.double().norm()) for e in exact]
    least = 1e-3 * max(norms)
    return [
        float((r.double() - e.double()).norm()) / max(norm, least)
        for r, e, norm in zip(results, exact, norms, strict=True)
    ]


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return type(value)(widened(v) for v in value) if isinstance(value, (list, tuple)) else value


def work(family: Family) -> tuple[int, int]:
    """(parameters, floating-point operations of a forward), counted without memory."""
    with torch.device("meta"):
        block = family.block()
    count = flops = 0
    for name, p in block.named_parameters():
        if p.ndim == 2 and "table" not in name:
            count += p.numel()
            flops += 2 * p.numel() * tokens_of(name, family)
    tokens = (family.tokens + family.text * (family.streams - 1)) // family.samples
    return count, flops + 4 * family.samples * tokens**2 * family.width


def tokens_of(name: str, family: Family) -> int:
    """How many rows a linear layer of this name multiplies."""
    if "norm" in name:  # it makes a modulation
        return family.samples
    if "context" in name or ".add_" in name or "to_add_out" in name:
        return family.text
    if "attn2.to_k" in name or "attn2.to_v" in name:
        return family.text if family.text and family.streams == 1 else family.tokens
    return family.tokens + family.text * family.joined


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
                    op=family.name,
                    mode=mode,
                    case=family.case + ", LoRA" * lora,
                    dtype=dtype,
                    bytes=factor * size * (parameters + 2 * family.tokens * family.width),
                    flops=factor * flops,
                    inputs=partial(inputs, make, dtype, lora),
                    providers={
                        "sora_kernels": provider("ours", mode),
                        "plain": provider("plain", mode),
                        "compile": provider("plain", mode, compile=True),
                        "patched_compile": provider("ours", mode, compile=True),
                    },
                    tolerance=float("inf"),  # `check` does it
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
