"""The same check for csrc/cuda: `nvcc --resource-usage` needs no GPU either."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<regs>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


def check_cuda_source(path: Path, archs: Iterable[int], nvcc: str) -> list[dict[str, Any]]:
    """Rows for every `__global__` function of a `.cu` file, from `nvcc --resource-usage`."""
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = "-c -O3 --resource-usage -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000".split()
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"-I{include}", f"-I{path.parents[1] / 'common'}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, str(path), "-o", f"{folder}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        error = next((x for x in result.stderr.splitlines() if "error" in x), "nvcc failed")
        raise ValueError(f"{path}: {error}")
    rows = []
    for entry in _ENTRY.finditer(result.stdout + result.stderr):
        spill = int(entry["stores"]) + int(entry["loads"])
        smem = re.search(r"(\d+) bytes smem", entry["rest"])
        rows.append(
            {
                "kernel": f"{path.name}/{entry['name']}",
                "arch": int(entry["arch"]),
                "config": "nvcc",
                "regs": int(entry["regs"]),
                "stack": int(entry["stack"]),
                "spill_bytes": spill,
                "smem": int(smem[1]) if smem else 0,
                "features": [],
                "cached": False,
                "problems": [f"spills {spill} bytes"] if spill else [],
                "ok": not spill,
            }
        )
    return rows


def cuda_rows(archs: Iterable[int]) -> tuple[list[dict[str, Any]], str]:
    """Rows of csrc/cuda and one line that says what was done about it."""
    folder = Path(__file__).parents[2] / "csrc" / "cuda"
    sources = sorted(folder.glob("*.cu"))
    if not sources:
        return [], "csrc/cuda: no CUDA sources"
    nvcc = find_nvcc()
    if nvcc is None:
        return [], f"csrc/cuda: {len(sources)} sources not checked, nvcc is not on PATH"
    rows = [row for path in sources for row in check_cuda_source(path, archs, nvcc)]
    return rows, f"csrc/cuda: {len(sources)} sources checked with {nvcc}"
