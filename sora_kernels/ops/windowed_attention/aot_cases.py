"""The production configurations of the kernels, for the cross-compiler (`sora_kernels.aot`)."""

from __future__ import annotations

import torch

from ...aot import ARCHS, AotCase
from ..packed_attention.config import Config, Launch
from .config import choose_config
from .kernels import _windowed_attention_fwd_kernel
from .kernels_bwd import _windowed_attention_bwd_kernel_dkv, _windowed_attention_bwd_kernel_dq

HEAD_DIMS = (64, 72, 96, 128)
_KERNELS = {
    "fwd": _windowed_attention_fwd_kernel,
    "dq": _windowed_attention_bwd_kernel_dq,
    "dkv": _windowed_attention_bwd_kernel_dkv,
}
_DOTS = {"fwd": 2, "dq": 3, "dkv": 4}  # tl.dot of each kernel per part of the head dim
_FP32 = ("lse_ptr", "delta_ptr")
_INT32 = ("work_ptr", "cu_ptr", "table_ptr")


def matrix_case(
    kind: str, head_dim: int, dtype: str, launch: Launch, config: Config, archs: tuple[int, ...]
) -> AotCase:
    """One kernel, with the strides of a packed QKV of 16-byte rows."""
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
    return AotCase(
        name=f"{kind}_hd{head_dim}_{dtype}_sm{'_'.join(map(str, archs))}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        memory_bound=False,
        dots=_DOTS[kind] * (2 if config.dim2 else 1),
        divisible=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
        archs=archs,
        fma_ok=dtype == "fp32",
    )


def aot_cases() -> list[AotCase]:
    """Every head dim and direction at the launch each chip gets; chips that agree share a case.

    The window, its edges, causality and sink are run-time integers, so these are all there are.
    """
    cases = []
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
