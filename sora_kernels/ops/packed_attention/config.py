"""Launch configurations of `packed_attention`: a pure function of head dim, dtype and chip.

Nothing here may depend on the pack: the blocks decide the order of summation, and packed must
equal alone bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """`block_m` query rows by `block_n` key rows; `group` query (or key) blocks run per head
    before the next head starts, so that neighbours on the chip share their keys in L2.
    `descriptors`: the loop reads by tensor descriptors where all it reads is `describable`; where
    it is not, by pointers in at most `pointer_stages`, as addresses take registers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group: int = 16
    descriptors: bool = False
    pointer_stages: int = 2

    def stages(self, descriptors: bool) -> int:
        """Stages of the loop, which decide about no bit, where it reads by descriptors or not."""
        most = self.pointer_stages if self.descriptors and not descriptors else self.num_stages
        return min(self.num_stages, most)


@dataclass(frozen=True)
class Config:
    """Launches of the three matrix kernels, and the two powers of two that tile the head dim."""

    fwd: Launch
    dq: Launch
    dkv: Launch
    dim1: int
    dim2: int


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Powers of two (>= 16, or 0) whose sum covers `head_dim` with the least padding.

    72 -> (64, 16), 96 -> (64, 32): fewer registers and bytes than one padded 128.
    """
    single = 16
    while single < head_dim:
        single *= 2
    low = single // 2
    if single == head_dim or low < 16:
        return single, 0
    rest = 16
    while low + rest < head_dim:
        rest *= 2
    return (low, rest) if rest < low else (single, 0)


FAR = 2**30
"""More rows than a pack may have that is read by descriptors."""


def describable(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether the descriptors of `descriptors.py` can say where a tensor `[N, H, D]` lies.

    cuTensorMapEncodeTiled (CUDA driver API) wants an address and outer strides that are multiples
    of 16 bytes, and one element as the innermost stride.
    """
    row, head = strides[0] * itemsize, strides[1] * itemsize
    return (
        (address | row | head) % 16 == 0
        and strides[2] == 1
        and min(shape) > 0
        and shape[0] < FAR
        and 0 < row < 2**34
        and 0 < head < 2**34
    )


_forced: bool | None = None


@contextmanager
def forced_descriptors(on: bool) -> Iterator[None]:
    """For tests and benchmarks: every launch reads by descriptors (or none), whatever its config.

    Process-wide. Tensors that are not `describable` then raise a ValueError.
    """
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


def wants_descriptors(launch: Launch, *tensors: Tensor) -> bool:
    """Whether a launch reads these tensors by descriptors; by pointers if not."""
    if not (launch.descriptors if _forced is None else _forced):
        return False
    for x in tensors:
        if not describable(x.data_ptr(), x.shape, x.stride(), x.element_size()):
            if _forced is None:
                return False
            raise ValueError(
                "forced_descriptors: expected a base and strides that are multiples of 16 bytes, "
                f"got address {x.data_ptr():#x}, strides {x.stride()} of {x.dtype}"
            )
    return True


INTERPRETER = Launch(32, 32, 1, 1, group=1)


def choose_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Config:
    """The launches for a chip; `capability=None` is the interpreter."""
    dim1, dim2 = split_head_dim(head_dim)
    if capability is None:
        return Config(INTERPRETER, INTERPRETER, INTERPRETER, dim1, dim2)
    if dtype is torch.float32:  # full-precision FMA: for tests, not for speed
        if dim1 + dim2 <= 64:
            small = Launch(32, 32, 8, 1)
            return Config(small, small, small, dim1, dim2)
        # 32 keys, because the forward halves the block at the edges and tl.dot needs 16.
        small = Launch(16, 16, 4, 1)
        return Config(Launch(16, 32, 8, 1), small, small, dim1, dim2)
    return _half_precision(capability[0], dim1, dim2)


def reads_by_descriptors(kind: str, major: int, wide: int) -> bool:
    """Where the TMA unit exists, and the cross-compiler finds no spills with it.

    Descriptors free the registers that held addresses. But operands that `mma.sync` reads from
    their layout in shared memory cost the backward on sm_120 more than that, and on sm_100 ptxas
    holds two of its kernels to 128 registers.
    """
    if major == 12:
        return kind == "fwd"
    return major >= 9 and (major, kind, wide) not in ((10, "dkv", 128), (10, "dq", 256))


def _half_precision(major: int, dim1: int, dim2: int) -> Config:
    wide = dim1 + dim2

    def launch(kind: str, block_m: int, block_n: int, warps: int = 8, stages: int = 2) -> Launch:
        descriptors = reads_by_descriptors(kind, major, wide)
        return Launch(block_m, block_n, warps, stages, descriptors=descriptors)

    if major == 9:
        numbers = dict(zip(("fwd", "dq", "dkv"), _hopper(wide, dim2), strict=True))
        launches = {kind: launch(kind, *numbers[kind]) for kind in numbers}
        if launches["dkv"].num_warps == 4:  # two programs of up to 255 registers
            launches["dkv"] = launches["dkv"]._replace(pointer_stages=1)
        return Config(dim1=dim1, dim2=dim2, **launches)
    if wide > 128:
        rows = 64 if major == 10 else 32
        fwd = launch("fwd", 64, 32, 8, 1)
        dq, dkv = launch("dq", rows, 32, 8, 1), launch("dkv", 32, rows, 8, 1)
    elif major == 10:
        fwd = launch("fwd", 128, 128, 8, 2 if wide > 64 else 3)
        dq, dkv = launch("dq", 128, 64), launch("dkv", 32 if wide > 64 else 64, 128)
        if wide == 128:  # ptxas holds it to 128 registers
            dq = dq._replace(pointer_stages=1)
    else:
        # Three of heads of 128 take more than the 99 KB of 8.6, 8.9 and 12.0 in the backward.
        stages = 3 if wide <= 96 else 2
        fwd, dq = launch("fwd", 128, 64, 8, 3), launch("dq", 64, 64, 8, stages)
        rows, last = 32 if dim2 else 64, stages
        if major == 12 and wide > 80:  # else it spills
            rows, last = 32, 2 if dim2 else 3
        dkv = launch("dkv", rows, 64, 8, last)
    return Config(fwd, dq, dkv, dim1, dim2)


def _hopper(wide: int, dim2: int) -> tuple[tuple[int, int, int, int], ...]:
    """Block of queries, of keys, warps and stages of the forward, of dq and of dk and dv.

    Of `s` stages Triton issues a load at the end of an iteration, for the one `s - 1` further: with
    two, the next iteration waits for most of its latency. And the warp groups of a program come
    to the softmax together, while the matrix unit stands still. Where registers allow, two programs
    therefore share an SM: up to 128 of 8 warps (forward, heads up to 80), 255 of 4 (dk and dv).
    """
    if wide > 128:
        return (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)
    fwd = (128, 64 if wide <= 80 else 128, 8, 3)
    dkv = (32, 128, 8, 3) if wide > 96 else (32 if dim2 else 64, 64, 4, 3)
    return fwd, (128, 64, 8, 3), dkv


def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


# What torch.compiler.assume_constant_result does; that one imports all of torch._dynamo, which
# takes longer than everything else in this package.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def chip_of(q: Tensor) -> tuple[int, int] | None:
    """Compute capability of the chip that ``q`` lies on; None = the interpreter."""
    return _capability(q.device.index) if q.device.type == "cuda" else None


def config_for(q: Tensor) -> Config:
    """The launches for queries like ``q`` on the chip they lie on."""
    return choose_config(q.shape[2], q.dtype, chip_of(q))
