"""Toy kernels for the tests of sora_kernels.aot: one good, and one for every way to fail."""

import triton
import triton.language as tl

from sora_kernels.aot import AotCase


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x_ptr + row * stride + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(values))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + rows[:, None] * k + (start + inner)[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * N + columns[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def descriptor_copy_kernel(x_desc, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * ROWS
    offsets = (at + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offsets, x_desc.load([at, 0]))


@triton.jit
def silent_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < n, other=0.0)


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def _copy(name: str, divisible: tuple[str, ...]) -> AotCase:
    return AotCase(name, copy_kernel, {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32"},
                   {"BLOCK": 1024}, divisible=divisible)  # fmt: skip


def _row_sum(name: str, narrow_store_ok: bool) -> AotCase:
    return AotCase(name, row_sum_kernel, {"x_ptr": "*bf16", "out_ptr": "*fp32", "stride": "i32"},
                   {"BLOCK": 1024}, divisible=("x_ptr", "out_ptr", "stride"),
                   narrow_store_ok=narrow_store_ok)  # fmt: skip


def _matmul(name: str, dtype: str, sizes: tuple[int, int, int], stages: int = 2, warps: int = 4,
            precision: str = "tf32", **kwargs: object) -> AotCase:  # fmt: skip
    signature = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": f"*{dtype}", "k": "i32"}
    constexprs = {**dict(zip("MNK", sizes, strict=True)), "PRECISION": precision}
    return AotCase(name, matmul_kernel, signature, constexprs, warps, stages, memory_bound=False,
                   dots=1, divisible=tuple(signature), **kwargs)  # type: ignore[arg-type]  # fmt: skip


def aot_cases() -> list[AotCase]:
    return [
        _copy("good_copy", ("x_ptr", "out_ptr", "n")),
        _copy("scalar_copy", ()),
        _row_sum("row_sum", True),
        _row_sum("row_sum_narrow", False),
        _matmul("good_matmul", "bf16", (128, 128, 64)),
        _matmul("spilling_matmul", "bf16", (256, 256, 32), stages=1),
        _matmul("big_smem_matmul", "bf16", (256, 128, 128), stages=4, warps=8),
        _matmul("fma_matmul", "fp32", (32, 32, 32), stages=1, precision="ieee"),
        _matmul("fma_matmul_ok", "fp32", (32, 32, 32), stages=1, precision="ieee", fma_ok=True),
        AotCase("descriptor_copy", descriptor_copy_kernel,
                {"x_desc": "tensordesc<bf16[32, 64]>", "out_ptr": "*bf16"},
                {"ROWS": 32, "COLUMNS": 64}, descriptors=1, divisible=("out_ptr",)),
        AotCase("silent", silent_kernel, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 128}),
        AotCase("broken", broken_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 128}),
    ]  # fmt: skip
