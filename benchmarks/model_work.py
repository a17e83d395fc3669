"""Which kernels a benchmark case launches, how many programs, and what each of them moves.

Shapes are read from the names of the cases, block sizes from the cross-compiled kernels, so that
model, benchmarks and compiler speak of the same launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from sora_kernels.ops._config import block_tokens
from sora_kernels.ops.packed_attention.config import reads_by_descriptors, split_head_dim
from sora_kernels.ops.qk_norm_rope.config import backward_steps

Kernel = Mapping[str, Any]  # a row of model_aot.json
Find = Callable[[str], Kernel]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the compiled kernel.
        programs: thread blocks.
        bytes, flops: of all programs together.
        matrix: whether the FLOPs are the matrix units'.
        steps: iterations of a program's loop.
        pipelined: whether an iteration's loads are issued during the ones before it.
    """

    kernel: Kernel
    programs: int
    bytes: float
    flops: float
    matrix: bool = False
    steps: int = 1
    pipelined: bool = False


def numbers(text: str) -> list[int]:
    """The sizes of "96x4x240x208", wherever they stand in a name."""
    found = re.search(r"\d+(?:x\d+)+", text)
    if found is None:
        raise ValueError(f"case: expected sizes such as 4096x1152 in its name, got {text!r}")
    return [int(n) for n in found[0].split("x")]


_ROW_SUMS = {"norm_modulate": 2, "gate_residual_norm_modulate": 3, "gate_residual": 1}


def _rows(case: Mapping[str, Any], find: Find) -> list[Launch]:
    """Ops over [tokens, width]; a backward walks over its tokens one by one, and where it sums by
    modulation row (R) a second launch adds the partial sums of its programs."""
    tokens, width = numbers(case["case"])
    op, mode = case["op"].removesuffix("_rows"), case["mode"]
    sandwich = "_sandwich" if "tanh" in case["case"] else ""
    kernel = find(f"{op}/{op}_{mode}_d{width}{sandwich}")
    slices = ceil(width / kernel["BLOCK_D"])
    if mode == "fwd":
        programs = ceil(tokens / kernel["BLOCK_ROWS"]) * slices
        return [Launch(kernel, programs, case["bytes"], case["flops"])]

    steps = block_tokens(tokens, slices)
    blocks = ceil(tokens / steps)
    each = f"R={tokens}" in case["case"] or "R=N" in case["case"]  # rows of one token: no loop
    pipelined = kernel.get("STAGES", 1) > 1 and not each
    sums = 0 if each else _ROW_SUMS.get(op, 0)
    partials = 4 * blocks * width * sums  # bytes; written, then read
    first = Launch(
        kernel, blocks * slices, case["bytes"] + partials, case["flops"], False, steps, pipelined
    )
    if not sums:
        return [first]
    found = re.search(r"R=(\d+)", case["case"])
    rows = int(found[1]) if found else 1  # the fewest, which are the slowest to add
    second = find("norm_modulate/finish_rows")
    programs = rows * ceil(width / second["BLOCK_D"]) * sums
    waits = ceil(blocks / rows / second["BLOCK_B"])
    return [first, Launch(second, programs, partials, partials / 4, False, waits)]


def _guided_step(case: Mapping[str, Any], find: Find) -> list[Launch]:
    """One modulation row per sample: a video is one row of numbers, cut into slices."""
    kernel = find(f"guided_step/guided_step_{case['mode']}_d4096")
    batch, *shape = numbers(case["case"])
    programs = ceil(batch / kernel["BLOCK_ROWS"]) * ceil(prod(shape) / kernel["BLOCK_D"])
    return [Launch(kernel, programs, case["bytes"], case["flops"])]


def _causal_conv_pad(case: Mapping[str, Any], find: Find) -> list[Launch]:
    channels, frames, height, width = numbers(case["case"])
    kernel = find(f"causal_conv_pad/causal_conv_pad_{case['mode']}_w208_c96")
    rows = (frames + 2) * (height + 2)
    programs = rows * ceil((width + 2) * channels / kernel["BLOCK_ROW"])
    return [Launch(kernel, programs, case["bytes"], case["flops"])]


def _norm_silu(case: Mapping[str, Any], find: Find) -> list[Launch]:
    norm, _, layout = case["case"].split()
    channels, *shape = numbers(case["case"])
    positions = prod(shape)
    if norm == "rms":
        compiled = {("last", 96): 96, ("last", 384): 384}.get((layout, channels), 128)
        kernels = [find(f"norm_silu/rms_{case['mode']}_c{compiled}_{layout}")]
        shares = [1.0]
    else:  # statistics first, then the output: GroupNorm reads its input twice
        first = "stats" if case["mode"] == "fwd" else "sums"
        kernels = [find(f"norm_silu/group_{name}_c256_{layout}") for name in (first, case["mode"])]
        shares = [1 / 3, 2 / 3] if case["mode"] == "fwd" else [2 / 5, 3 / 5]
    return [
        Launch(
            kernel,
            ceil(positions / kernel["BLOCK_L"]) * ceil(channels / kernel["BLOCK_C"]),
            share * case["bytes"],
            share * case["flops"],
        )
        for kernel, share in zip(kernels, shares, strict=True)
    ]


def _patchify(case: Mapping[str, Any], find: Find) -> list[Launch]:
    """One launch per clip."""
    to_tokens = (case["op"] == "patchify") == (case["mode"] == "fwd")
    kernel = find(f"patchify/latent_1x2x2_{'to' if to_tokens else 'from'}_tokens_bf16")
    clips = int(case["case"].split()[0])
    tile = 2 * 2 * kernel["BLOCK_W"] * kernel["BLOCK_F"]  # bytes read plus bytes written, bf16
    programs = max(1, ceil(case["bytes"] / clips / tile))
    return [Launch(kernel, programs, case["bytes"] / clips, 0)] * clips


# Compiled kernels with the tile of the case: Wan 1.3B has as many heads as Cosmos nearly, and its
# own compiled one is Wan 14B's.
_QK_KERNELS = {"dit-xl": "width_72", "hunyuan joint": "hunyuan_joint", "wan": "cosmos"}


def _qk_norm_rope(case: Mapping[str, Any], find: Find) -> list[Launch]:
    """q and k in one launch. A backward walks over tiles, summing the weights' gradients."""
    name, sizes = case["case"].rsplit(" ", 1)
    kernel = find(f"qk_norm_rope/{case['mode']}_{_QK_KERNELS.get(name, name)}_bf16")
    *parts, heads, _ = [int(n) for n in re.split(r"[x+]", sizes)]
    head_blocks = ceil(heads / kernel["HEADS"])
    tiles = ceil(sum(parts) / kernel["TOKENS"]) * head_blocks
    steps = 1
    if case["mode"] == "bwd":
        steps = backward_steps(sum(parts), head_blocks, kernel["TOKENS"])
    return [Launch(kernel, 2 * ceil(tiles / steps), case["bytes"], case["flops"], steps=steps)]


def _attention(case: Mapping[str, Any], find: Find) -> list[Launch]:
    """Forward: 2 matrix products. Backward: 5 are counted; dq computes 3 and dkv 4 of them, the
    scores and their gradient twice, after a pass over out and dout. The kernels are those that
    read by descriptors, where the chip's launches do."""
    op = "windowed_attention" if case["case"].startswith("window") else "packed_attention"
    *_, tokens, heads, width = numbers(case["case"])

    def launch(kind: str, block: str, bytes: float, flops: float) -> Launch:
        kernel = find(f"{op}/{kind}_hd{width}_bf16")
        if reads_by_descriptors(kind, kernel["arch"] // 10, sum(split_head_dim(width))):
            kernel = find(f"{op}/{kind}_hd{width}_bf16_tma")
        return Launch(kernel, heads * ceil(tokens / kernel[block]), bytes, flops, matrix=True)

    if case["mode"] == "fwd":
        return [launch("fwd", "BLOCK_M", case["bytes"], case["flops"])]
    delta = find(f"packed_attention/delta_hd{width if width in (72, 128) else 128}_bf16")
    unit = case["bytes"] / 8  # q, k, v, out, dout -> dq, dk, dv
    return [
        Launch(delta, heads * ceil(tokens / delta["BLOCK"]), 2 * unit, 0),
        launch("dq", "BLOCK_M", 5 * unit, case["flops"] * 3 / 5),
        launch("dkv", "BLOCK_N", 6 * unit, case["flops"] * 4 / 5),
    ]


_BY_OP: dict[str, Callable[[Mapping[str, Any], Find], list[Launch]]] = {
    "bias_gelu": _rows,
    "gate_residual": _rows,
    "gate_residual_norm_modulate": _rows,
    "norm_modulate": _rows,
    "norm_modulate_rows": _rows,
    "guided_step": _guided_step,
    "causal_conv_pad": _causal_conv_pad,
    "norm_silu": _norm_silu,
    "patchify": _patchify,
    "unpatchify": _patchify,
    "qk_norm_rope": _qk_norm_rope,
    "packed_attention": _attention,
}


def launches(case: Mapping[str, Any], find: Find) -> list[Launch] | None:
    """What a case (keys op, mode, case, dtype, bytes, flops) launches; None where the model has
    no kernels to reason with: host code, and dtypes other than the compiled bf16."""
    build = _BY_OP.get(case["op"])
    if build is None or case["dtype"] != "bf16" or case["mode"] not in ("fwd", "bwd"):
        return None
    return build(case, find)
