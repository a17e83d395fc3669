"""What this machine can do: the two rates that every floor is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .timing import Run, measure, measure_cuda, quantile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ceilings:
    """Measured, not from a datasheet.

    ``copy_gbps``: ``Tensor.copy_`` between fp32 tensors far larger than any cache, bytes read plus
    bytes written. On a CPU the destination's lines may be read before they are written; that
    hidden read is not counted, so code with streaming stores can come out above this ceiling.
    ``matmul_tflops``: a square ``torch.mm`` in ``matmul_dtype``; ``by_dtype`` has the other rates,
    and a row's floor uses the rate of its own dtype.
    """

    copy_gbps: float
    matmul_tflops: float
    matmul_dtype: str
    by_dtype: dict[str, float]

    def floor_ms(self, bytes: float, flops: float, dtype: str) -> float:
        """The least time for this much traffic and this much arithmetic."""
        rate = self.by_dtype.get(dtype, self.matmul_tflops)
        return max(bytes / (self.copy_gbps * 1e6), flops / (rate * 1e9))

    def as_dict(self) -> dict[str, Any]:
        return {
            "copy_gbps": self.copy_gbps,
            "matmul_tflops": self.matmul_tflops,
            "matmul_dtype": self.matmul_dtype,
            "matmul_tflops_by_dtype": self.by_dtype,
        }


def copy_probe(bytes: int, device: str) -> tuple[Run, int]:
    """A call that copies between two fp32 tensors, and the bytes it reads plus writes."""
    source = torch.randn(max(1, bytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def measure_ceilings(device: str = "cpu", *, quick: bool = False) -> Ceilings:
    """Measures both rates with the threads and the allocator that the benchmarks use.

    The fast end of the samples (p20) is taken: a ceiling that a busy neighbour lowered would
    flatter every row.
    """
    cuda = device == "cuda"
    elements = 1 << 26
    if cuda:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        elements = min(1 << 30, total // 64)
    side = 8192 if cuda else 2048
    dtypes = ("bf16", "fp16", "fp32") if cuda else ("fp32", "bf16")
    seconds = 0.5 if quick else 2.0

    def best(run: Run) -> float:
        timer: Callable[..., dict[str, list[float]]] = measure_cuda if cuda else measure
        return quantile(timer({"it": run}, seconds=seconds)["it"], 0.2)

    copy, moved = copy_probe(8 * elements, device)
    copy_gbps = moved / best(copy) / 1e6
    del copy  # and with it the two buffers
    rates = {}
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        rates[name] = 2 * side**3 / best(product) / 1e9
    return Ceilings(copy_gbps, rates[dtypes[0]], dtypes[0], rates)
