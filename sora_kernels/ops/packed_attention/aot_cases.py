"""The production configurations of the kernels, for the cross-compiler (`sora_kernels.aot`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ...aot import ARCHS, AotCase
from .config import Config, Launch, choose_config
from .kernels import _packed_attention_fwd_kernel
from .kernels_bwd import (
    DELTA_BLOCK,
    _packed_attention_bwd_kernel_delta,
    _packed_attention_bwd_kernel_dkv,
    _packed_attention_bwd_kernel_dq,
)

Choose: TypeAlias = Callable[[int, torch.dtype, tuple[int, int] | None], Config]

HEAD_DIMS = (64, 72, 96, 128, 256)
_KERNELS = {
    "fwd": _packed_attention_fwd_kernel,
    "dq": _packed_attention_bwd_kernel_dq,
    "dkv": _packed_attention_bwd_kernel_dkv,
}
# tl.dot in the source of each kernel per part of the head dim, both loops counted.
_DOTS = {"fwd": 4, "dq": 6, "dkv": 8}
_FP32 = ("lse_ptr", "delta_ptr", "dlse_ptr")
_INT32 = ("work_ptr", "cu_ptr", "cu_q_ptr", "cu_k_ptr", "table_ptr")


def matrix_case(
    kernel: Any, kind: str, dots: int, head_dim: int, dtype: str, launch: Launch, config: Config,
    archs: tuple[int, ...],
) -> AotCase:  # fmt: skip
    """A matrix kernel, dense or windowed, with the strides of a packed QKV of 16-byte rows.

    ``dots`` counts `tl.dot` per part of the head dim.
    """
    constexprs: dict[str, object] = {
        "D": head_dim,
        "D1": config.dim1,
        "D2": config.dim2,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STEP": 4 if dtype == "fp32" else 8,
        "GROUP": launch.group,
        "UPCAST": False,
    }
    parts = 2 if config.dim2 else 1
    rows = launch.block_m if kind == "dkv" else launch.block_n
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith(("_desc", "_edge")):
            width = config.dim2 if "2" in name else config.dim1
            if launch.descriptors and width:
                box = f"{rows // 2 if name.endswith('_edge') else rows}, {width}"
                signature[name] = f"tensordesc<{dtype}[1, 1, 1, {box}]>"
            else:
                constexprs[name] = None
        elif name.endswith("_ptr"):
            element = "fp32" if name in _FP32 else "i32" if name in _INT32 else dtype
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    reads = "_tma" if launch.descriptors else ""
    return AotCase(
        name=f"{kind}_hd{head_dim}_{dtype}{reads}_sm{'_'.join(map(str, archs))}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        memory_bound=False,
        # Beyond head dim 128 the 64 rows of a wgmma do not fit the registers of a backward on
        # sm_90: it runs on 32 rows, by mma.sync.
        dots=0 if 90 in archs and launch.block_m < 64 and head_dim > 128 else dots * parts,
        descriptors=sum(t.startswith("tensordesc") for t in signature.values()),
        divisible=tuple(n for n in signature if n.endswith("_ptr")),
        archs=archs,
        fma_ok=dtype == "fp32",
    )


def delta_case(head_dim: int) -> AotCase:
    kernel = _packed_attention_bwd_kernel_delta
    pointers = {"out_ptr": "*bf16", "dout_ptr": "*bf16"}
    pointers |= dict.fromkeys(("lse_ptr", "dlse_ptr", "log2_ptr", "delta_ptr"), "*fp32")
    scalars = dict.fromkeys(("num_tokens", "heads", "stride_on", "stride_oh"), "i32")
    return AotCase(
        name=f"delta_hd{head_dim}_bf16",
        kernel=kernel,
        signature=pointers | scalars,
        constexprs={
            "HAS_DLSE": False,
            "D": head_dim,
            "WIDTH": 1 << (head_dim - 1).bit_length(),
            "BLOCK": DELTA_BLOCK,
            "STEP": 8,
        },
        num_warps=4,
        divisible=tuple(pointers),
        narrow_store_ok=True,
    )


def matrix_cases(kernels: dict[str, Any], dots: dict[str, int], choose: Choose) -> list[AotCase]:
    """Every head dim and direction at the launch each chip gets; chips that agree share a case.

    A launch that reads by descriptors is also compiled for tensors that they cannot describe.
    """
    cases = []
    shapes = [(d, torch.bfloat16, "bf16") for d in HEAD_DIMS]
    for head_dim, dtype, name in [*shapes, (64, torch.float32, "fp32")]:
        for kind, kernel in kernels.items():
            launches: dict[Launch, list[int]] = {}
            for arch in ARCHS if dtype is torch.bfloat16 else (80, 90):
                config = choose(head_dim, dtype, divmod(arch, 10))
                launch = getattr(config, kind)
                plain = launch._replace(descriptors=False, num_stages=launch.stages(False))
                for one in dict.fromkeys((launch, plain)):
                    launches.setdefault(one, []).append(arch)
            for launch, archs in launches.items():
                chips = tuple(archs)
                cases.append(
                    matrix_case(kernel, kind, dots[kind], head_dim, name, launch, config, chips)
                )
    return cases


def aot_cases() -> list[AotCase]:
    """Few on purpose (a compilation takes seconds): causal, grouped heads and cross-attention are
    run-time integers, and fp16 differs from bf16 in one field of an instruction."""
    matrices = matrix_cases(_KERNELS, _DOTS, choose_config)
    return [delta_case(72), delta_case(128), *matrices]
