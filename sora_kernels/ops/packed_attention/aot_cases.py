"""The production configurations of the kernels, for the cross-compiler (`sora_kernels.aot`)."""

from __future__ import annotations

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

HEAD_DIMS = (64, 72, 96, 128, 256)
_KERNELS = {
    "fwd": _packed_attention_fwd_kernel,
    "dq": _packed_attention_bwd_kernel_dq,
    "dkv": _packed_attention_bwd_kernel_dkv,
}
# tl.dot in the source of each kernel per part of the head dim, both loops counted.
_DOTS = {"fwd": 4, "dq": 6, "dkv": 8}
_FP32 = ("lse_ptr", "delta_ptr", "dlse_ptr")
_INT32 = ("work_ptr", "cu_q_ptr", "cu_k_ptr")


def matrix_case(
    kind: str, head_dim: int, dtype: str, launch: Launch, config: Config, archs: tuple[int, ...]
) -> AotCase:
    """One of the three matrix kernels, with the strides of a packed QKV of 16-byte rows."""
    kernel = _KERNELS[kind]
    constexprs = {
        "D": head_dim,
        "D1": config.dim1,
        "D2": config.dim2,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "GROUP": launch.group,
        "UPCAST": False,
    }
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr"):
            element = "fp32" if name in _FP32 else "i32" if name in _INT32 else dtype
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    dots = _DOTS[kind] * (2 if config.dim2 else 1)
    return AotCase(
        name=f"{kind}_hd{head_dim}_{dtype}_sm{'_'.join(map(str, archs))}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        memory_bound=False,
        # Beyond head dim 128 the 64 rows of a wgmma do not fit the registers of a backward on
        # sm_90: it runs on 32 rows, by mma.sync.
        dots=0 if 90 in archs and launch.block_m < 64 and head_dim > 128 else dots,
        divisible=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
        archs=archs,
        fma_ok=dtype == "fp32",
    )


def delta_case(head_dim: int) -> AotCase:
    kernel = _packed_attention_bwd_kernel_delta
    pointers = {"out_ptr": "*bf16", "dout_ptr": "*bf16", "dlse_ptr": "*fp32", "delta_ptr": "*fp32"}
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
        },
        num_warps=4,
        divisible=(*pointers, "stride_on", "stride_oh"),
        narrow_store_ok=True,
    )


def aot_cases() -> list[AotCase]:
    """Every head dim and direction at the launch each chip gets; chips that agree share a case.

    Few on purpose (a compilation takes seconds): causal, grouped heads and cross-attention are
    run-time integers, and fp16 differs from bf16 in one field of an instruction.
    """
    cases = [delta_case(72), delta_case(128)]
    shapes = [(d, torch.bfloat16, "bf16") for d in HEAD_DIMS]
    for head_dim, dtype, name in [*shapes, (64, torch.float32, "fp32")]:
        for kind in _KERNELS:
            launches: dict[Launch, list[int]] = {}
            for arch in ARCHS if dtype is torch.bfloat16 else (80, 90):
                config = choose_config(head_dim, dtype, divmod(arch, 10))
                launches.setdefault(getattr(config, kind), []).append(arch)
            for launch, archs in launches.items():
                cases.append(matrix_case(kind, head_dim, name, launch, config, tuple(archs)))
    return cases
