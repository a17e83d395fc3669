"""What op tests share: seeded data, poisoned allocations, and the 2x rule.

The 2x rule: a kernel passes if its error against the fp64 oracle is at most twice (gradients:
three times) the error of the reference run in the kernel's own dtype, plus two units in the last
place of the output. It never only warns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Widths that break things: below, at and above powers of two, odd, and those of real models.
WIDTHS = (1, 63, 64, 65, 72, 96, 100, 128, 240, 1152)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, a function of shape and seed alone."""
    generator = torch.Generator().manual_seed(seed + 1000003 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def far_apart(video: Tensor) -> Tensor:
    """``[1, 3, ...]`` in memory whose third channel begins 2^31 elements after the first.

    An offset that wraps around in int32 finds memory that is ours, but zeros, 2^31 elements before.
    The memory, 8 GB of fp16, is reserved; only what is written is ever used.
    """
    memory = torch.empty(2**32 + video[0, 0].numel(), dtype=video.dtype)
    strides = (2**31, 2**30, *torch.empty(video.shape[2:]).stride())
    far = memory.as_strided(video.shape, strides, 2**31)
    far.copy_(video)
    memory[: video[0, 0].numel()] = 0
    return far


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at the magnitude of ``value`` (fp64 result)."""
    info = torch.finfo(dtype)
    magnitude = value.abs().double().clamp_min(info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def check(
    got: Tensor,
    exact: Tensor,
    lowp: Tensor,
    *,
    grad: bool = False,
    extra_ulp: float = 0.0,
    name: str = "",
) -> None:
    """Asserts the 2x rule.

    Args:
        got: the kernel's result.
        exact: the reference in fp64.
        lowp: the reference in the kernel's dtype.
        grad: three times instead of twice.
        extra_ulp: more slack in ulp of the largest output; 1 for bf16 in the Triton interpreter,
            whose stores truncate.
    """
    label = f"{name}: " if name else ""
    assert got.shape == exact.shape, f"{label}shape {tuple(got.shape)} != {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{label}result is not finite"
    if got.numel() == 0:
        return
    error = (got.double() - exact.double()).abs().max().item()
    floor = (lowp.double() - exact.double()).abs().max().item()
    spacing = ulp(exact.abs().max(), got.dtype).item()
    bound = (3 if grad else 2) * floor + (2 + extra_ulp) * spacing
    assert error <= bound, f"{label}error {error:.3e} > {bound:.3e} (reference {floor:.3e})"


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory from ``torch.empty`` and friends holds NaN, so that a skipped write shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous, warn_only=warn_only)
