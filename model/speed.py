"""What share of a machine's arithmetic a training uses, by two denominators.

``matmul_share``: over the rate of a large square matrix product, measured here on the device, in
the dtype and with the threads of the training. It is known on every machine, and moves with it: a
busy neighbour lowers both.
``mfu`` (model FLOP utilisation, Chowdhery et al. 2022, arXiv 2204.02311, appendix B): over the
dense peak of the GPU's datasheet. A CPU has no such number here, so its rows carry none.

The numerator is `model.budget.training_flops`: what the model's definition needs, 2 FLOP per
multiply-accumulate, no matter what the kernels spend. Padding and recomputation do not raise it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.model_gpus import find

SIDE = {"cpu": 1024, "cuda": 4096}  # large enough that the product is bound by arithmetic


@dataclass(frozen=True)
class Machine:
    """Rates of matrix products in FLOP per second; a multiply-accumulate counts 2.

    Attributes:
        matmul: measured.
        peak: the datasheet's, dense; None where it is not known.
    """

    matmul: float
    peak: float | None = None

    def shares(self, flops_per_second: float) -> dict[str, float]:
        """`matmul_share` and, where the peak is known, `mfu`."""
        shares = {"matmul_share": round(flops_per_second / self.matmul, 4)}
        if self.peak is not None:
            shares["mfu"] = round(flops_per_second / self.peak, 4)
        return shares


def measure(device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
    """The machine that trains on `device` in `dtype`. Takes about 0.2 s; global chance is kept."""
    peak = None
    if device.type == "cuda":
        peak = datasheet_peak(torch.cuda.get_device_name(device), dtype)
    return Machine(matmul_rate(device, dtype), peak)


def datasheet_peak(gpu: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP per second of `gpu`, as its driver calls it, for matrix products of `dtype`.

    None for a GPU or a dtype that `benchmarks.model_gpus` does not list: TF32, in which fp32
    products run below float32_matmul_precision "highest", is not there.
    """
    try:
        known = find(gpu)
    except ValueError:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        return 1e12 * known.bf16_tflops
    exact = torch.get_float32_matmul_precision() == "highest"
    return 1e12 * known.fp32_tflops if dtype == torch.float32 and exact else None


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP per second of the fastest of the square products that fit into `seconds`.

    The fastest, because a neighbour can only make a product slower.
    """
    side = SIDE.get(device.type, SIDE["cpu"])
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=chance).to(device, dtype) for _ in range(2))
    out = a @ b  # the first product also sets things up
    best, until = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < until:
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
