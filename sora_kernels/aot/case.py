"""What an op tells the cross-compiler about one of its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class AotCase:
    """One kernel at one production configuration.

    signature: type of every run-time argument, e.g. `{"x_ptr": "*bf16", "n": "i32"}`.
    constexprs: value of every compile-time argument.
    memory_bound: the kernel must load and store at least 16 bytes per thread at a time.
    maxnreg: most registers per thread that the compiler may use, as given at launch.
    dots: number of `tl.dot` in the kernel; each must become a tensor-core instruction.
    descriptors: number of loads by tensor descriptors; each must become a TMA instruction.
    divisible: arguments (pointers, strides, sizes) that are multiples of 16 in production.
    fma_ok: the dots may become plain FMA code (fp32 inputs at full precision).
    narrow_store_ok: a memory-bound kernel whose only output is small (one value per row, say).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None
    memory_bound: bool = True
    dots: int = 0
    descriptors: int = 0
    divisible: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHS
    enable_fp_fusion: bool = True
    fma_ok: bool = False
    narrow_store_ok: bool = False

    def validate(self) -> None:
        """Raise ValueError unless signature and constexprs cover the kernel's arguments."""
        names = list(self.kernel.arg_names)
        given = [*self.signature, *self.constexprs]
        if sorted(names) != sorted(given):
            missing = [n for n in names if n not in given]
            extra = [n for n in given if n not in names or given.count(n) > 1]
            raise ValueError(f"AotCase {self.name}: missing arguments {missing}, unknown {extra}")
        if unknown := [n for n in self.divisible if n not in self.signature]:
            raise ValueError(f"AotCase {self.name}: divisible names {unknown}, not in signature")

    @property
    def config(self) -> str:
        parts = [f"{k}={_short(v)}" for k, v in self.constexprs.items()]
        parts += [f"warps={self.num_warps}", f"stages={self.num_stages}"]
        return " ".join([*parts, *([f"maxnreg={self.maxnreg}"] if self.maxnreg else [])])


def _short(value: object) -> str:
    return getattr(value, "__name__", None) or str(value)
