"""The cross-compilation check: all production kernels pass it, and toy kernels made to fail do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="cross-compilation needs triton")

from sora_kernels.aot import nvcc
from sora_kernels.aot.case import AotCase
from sora_kernels.aot.checking import SMEM_LIMIT, check, count_instructions
from sora_kernels.aot.compiling import Compiled

ROOT = Path(__file__).parents[2]
ARCHS = [80, 90, 100, 120]


def run_aot(
    *args: str, env: dict[str, str] | None = None, timeout: int = 1800
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "sora_kernels.aot", *args],
        cwd=ROOT,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def jobs() -> list[str]:
    return ["--jobs", os.environ.get("SORA_KERNELS_AOT_JOBS", str(os.cpu_count() or 1))]


@pytest.fixture(scope="module")
def toy_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    path = tmp_path_factory.mktemp("aot") / "toys.json"
    arguments = ["--module", "tests.aot.toy_kernels", "--arch", "80", "90", "--json", str(path)]
    result = run_aot(*arguments, *jobs())
    assert result.returncode == 1, result.stderr
    rows = json.loads(path.read_text())["rows"]
    return {(row["kernel"].split("/")[1], row["arch"]): row for row in rows}


def test_every_kernel_is_within_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "aot.json"
    result = run_aot("--arch", *map(str, ARCHS), "--json", str(path), "--quiet", *jobs())
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["arch"] for row in rows} == set(ARCHS)
    assert all(row["ok"] for row in rows)
    checked = {row["kernel"].split("/")[0] for row in rows}
    ops = ROOT / "sora_kernels" / "ops"
    assert checked >= {folder.parent.name for folder in ops.glob("*/kernels.py")}
    fields = {"kernel", "arch", "config", "regs", "stack", "spill_bytes", "smem", "features", "ok"}
    assert all(fields <= set(row) for row in rows)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", ["good_copy", "row_sum", "fma_matmul_ok", "good_matmul"])
def test_a_good_kernel_is_ok(toy_rows: dict, case: str, arch: int) -> None:
    row = toy_rows[case, arch]
    assert row["ok"], row["problems"]
    assert row["regs"] > 0 and row["spill_bytes"] == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "case, problem",
    [
        ("scalar_copy", "no 16-byte loads; no 16-byte stores"),
        ("row_sum_narrow", "no 16-byte stores"),
        ("spilling_matmul", "spills"),
        ("big_smem_matmul", "shared memory"),
        ("fma_matmul", "for 1 dots"),
        ("silent", "stores nothing"),
        ("broken", "does not compile"),
    ],
)
def test_a_bad_kernel_is_not_ok(toy_rows: dict, case: str, problem: str, arch: int) -> None:
    row = toy_rows[case, arch]
    assert not row["ok"]
    assert problem in "; ".join(row["problems"])


def test_the_matrix_unit_is_the_chips(toy_rows: dict) -> None:
    assert "mma.sync" in toy_rows["good_matmul", 80]["features"]
    assert "wgmma" in toy_rows["good_matmul", 90]["features"]
    assert toy_rows["spilling_matmul", 80]["spill_bytes"] > 1000


def test_loads_by_descriptors_are_tma_copies(toy_rows: dict) -> None:
    """Triton lowers them to plain loads where there is no TMA unit."""
    row = toy_rows["descriptor_copy", 90]
    assert row["ok"] and "tma" in row["features"]
    row = toy_rows["descriptor_copy", 80]
    assert "0 TMA copies for 1 descriptor loads" in row["problems"] and not row["ok"]


def test_cache_gives_the_same_rows(toy_rows: dict, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    arguments = ["--module", "tests.aot.toy_kernels", "--arch", "80", "90", "--json", str(path)]
    run_aot(*arguments, *jobs())
    for row in json.loads(path.read_text())["rows"]:
        before = toy_rows[row["kernel"].split("/")[1], row["arch"]]
        assert row["cached"] or "does not compile" in row["problems"][0]
        volatile = ("cached", "seconds")
        assert {k: v for k, v in row.items() if k not in volatile} == {
            k: v for k, v in before.items() if k not in volatile
        }


LOG = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
RESOURCES = "REG:4 STACK:0 SHARED:0 LOCAL:0"


def _case(**kwargs: Any) -> AotCase:
    return AotCase("k", None, {}, **kwargs)


def test_a_trap_only_body_is_not_ok() -> None:
    ptx = ".visible .entry k()\n{\n\ttrap;\n\t// begin inline asm\n\texit;\n}\n"
    row = check(_case(memory_bound=False, dots=4), 100, Compiled(ptx, LOG, RESOURCES, 0))
    assert row["problems"] == ["trap only"] and not row["ok"]


def test_compiler_output_that_says_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not report"):
        check(_case(), 80, Compiled("st.global.b32 [%rd1], %r1;", "", RESOURCES, 0))


def test_every_limit_counts_from_the_first_byte_over() -> None:
    ptx = "st.global.v4.b32 [%rd1], {%r1};\nld.global.v4.b32 {%r1}, [%rd1];"
    for arch, limit in SMEM_LIMIT.items():
        assert check(_case(), arch, Compiled(ptx, LOG, RESOURCES, limit))["ok"]
        assert not check(_case(), arch, Compiled(ptx, LOG, RESOURCES, limit + 1))["ok"]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", ("ld16", 1)),
        ("ld.global.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd3];", ("ld16", 1)),
        ("ld.global.nc.v8.b32 {%r1}, [%rd3];", ("ld16", 1)),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", ("ld16", 0)),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", ("ld16", 0)),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", ("st16", 1)),
        ("st.global.v4.b16 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", ("st16", 0)),
        ("st.shared.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", ("st16", 0)),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", ("ld16", 1)),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", ("ld16", 0)),
    ],
)
def test_width_of_an_access(line: str, expected: tuple[str, int]) -> None:
    name, count = expected
    assert count_instructions(line)[name] == count


def test_case_must_cover_the_kernels_arguments() -> None:
    class Kernel:
        arg_names = ("x_ptr", "BLOCK")

    with pytest.raises(ValueError, match="missing arguments \\['BLOCK'\\]"):
        AotCase("k", Kernel, {"x_ptr": "*fp32"}).validate()
    with pytest.raises(ValueError, match="unknown \\['n'\\]"):
        AotCase("k", Kernel, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1}).validate()
    with pytest.raises(ValueError, match="divisible"):
        AotCase("k", Kernel, {"x_ptr": "*fp32"}, {"BLOCK": 1}, divisible=("n",)).validate()


@pytest.mark.parametrize(
    "args, env, message",
    [
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["--only", "no_such_op"], {}, "--only: expected one of"),
        (["--module", "no_such_module"], {}, "no_such_module"),
        (["--module", "json"], {}, "aot_cases"),
        (["--arch", "70"], {}, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args: list, env: dict, message: str) -> None:
    result = run_aot(*args, env=env)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


CUDA_SOURCE = """
extern "C" __global__ void scale(float* x, float factor) { x[threadIdx.x] *= factor; }
extern "C" __global__ void indexed(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * n];
  for (int i = 0; i < n; ++i) a[i & 63] += a[(i * 7) & 63];
  x[n] = a[n & 63];
}
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y, int n) {
  float a[200];
  #pragma unroll
  for (int i = 0; i < 200; ++i) a[i] = x[threadIdx.x + i * n];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 200; ++i) y[threadIdx.x + i * n] = a[i] * a[199 - i];
}
template <class T>
__global__ void copy_row(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void copy_row(const float*, float*);
template __global__ void copy_row(const float4*, float4*);
"""


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not on PATH")
def test_cuda_sources_are_checked_with_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORA_KERNELS_CACHE_DIR", str(tmp_path))
    source = tmp_path / "csrc" / "cuda" / "toy.cu"
    source.parent.mkdir(parents=True)
    source.write_text(CUDA_SOURCE)
    rows = nvcc.check_cuda_source(source, [80, 90], str(nvcc.find_nvcc()))
    found = {(row["kernel"], row["arch"]): row for row in rows}
    names = ("scale", "indexed", "spilling", "copy_row<float>", "copy_row<float4>")
    assert set(found) == {(f"toy.cu/{k}", a) for k in names for a in (80, 90)}
    assert all(row["regs"] > 0 for row in rows)
    assert found["toy.cu/scale", 80]["ok"]
    assert "spills" in found["toy.cu/spilling", 90]["problems"][0]
    # A kernel that is named a row kernel goes 16 bytes at a time.
    assert found["toy.cu/copy_row<float4>", 90]["ok"]
    narrow = found["toy.cu/copy_row<float>", 90]["problems"]
    assert narrow == ["no 16-byte loads", "no 16-byte stores"]
    # An array indexed at run time lives on the stack, which is not a spill.
    assert found["toy.cu/indexed", 80]["stack"] >= 256 and found["toy.cu/indexed", 80]["ok"]
    assert not any(row["cached"] for row in rows)
    again = nvcc.check_cuda_source(source, [80, 90], str(nvcc.find_nvcc()))
    assert [{**row, "cached": False} for row in again] == rows
    assert all(row["cached"] for row in again)
    source.write_text("__global__ void broken( {}")
    with pytest.raises(ValueError, match=r"toy\.cu: .*error"):
        nvcc.check_cuda_source(source, [80], str(nvcc.find_nvcc()))


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not on PATH")
def test_a_kernel_of_csrc_cuda_is_within_its_budget() -> None:
    """One small file on one chip; `python -m sora_kernels.aot --nvcc` checks them all."""
    rows, note = nvcc.cuda_rows([90], ["grouped_sum"])
    assert [row["kernel"] for row in rows] == ["grouped_sum.cu/finish_kernel"]
    assert rows[0]["ok"] and rows[0]["stack"] == 0 and rows[0]["regs"] <= 128
    assert note.startswith("csrc/cuda: 1 sources checked")
