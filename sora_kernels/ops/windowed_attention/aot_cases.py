"""The production configurations of the kernels, for the cross-compiler (`sora_kernels.aot`)."""

from __future__ import annotations

from ...aot import AotCase
from ..packed_attention.aot_cases import matrix_cases
from .config import choose_config
from .kernels import _windowed_attention_fwd_kernel
from .kernels_bwd import _windowed_attention_bwd_kernel_dkv, _windowed_attention_bwd_kernel_dq

_KERNELS = {
    "fwd": _windowed_attention_fwd_kernel,
    "dq": _windowed_attention_bwd_kernel_dq,
    "dkv": _windowed_attention_bwd_kernel_dkv,
}
_DOTS = {"fwd": 2, "dq": 3, "dkv": 4}  # tl.dot of each kernel per part of the head dim


def aot_cases() -> list[AotCase]:
    """The window, its edges, causality and sink are run-time integers, so these are all."""
    return matrix_cases(_KERNELS, _DOTS, choose_config)
