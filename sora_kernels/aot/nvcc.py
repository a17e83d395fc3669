"""The same check for csrc/cuda: nvcc and its `ptxas -v` need no GPU either."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from .checking import count_instructions
from .compiling import cache_dir

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = "-c -O3 -std=c++20 --fmad=false -Xptxas -v"  # those of setup.py
_CACHE_FORMAT = 1

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<regs>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_BODY = re.compile(r"\.entry (?P<name>\w+)\(.*?^}", re.DOTALL | re.MULTILINE)


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


@cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Short C++ names, ``kernel<bf16, float>``, where the binutils are there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool, *names], capture_output=True, text=True).stdout.splitlines()
    if len(text) != len(names):
        return {name: name for name in names}

    noise = r"^void |sora::(cuda::)?|\(anonymous namespace\)::|_GLOBAL__N__\w+::|\(bool\)"
    return {n: re.sub(noise, "", t).split("(")[0] for n, t in zip(names, text, strict=True)}


def _compile(path: Path, arch: int, nvcc: str) -> tuple[str, str]:
    """What ptxas said, and the PTX."""
    include = path.parents[1] / "common"
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"-I{include} -arch=sm_{arch} --keep --keep-dir {folder} -o {folder}/out.o"
        command = [nvcc, *FLAGS.split(), *arguments.split(), str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            error = next((x for x in result.stderr.splitlines() if "error" in x), "nvcc failed")
            raise ValueError(f"{path}: {error}")
        ptx = "\n".join(p.read_text() for p in Path(folder).glob("*.ptx"))
    return result.stdout + result.stderr, ptx


def _rows(path: Path, log: str, ptx: str) -> list[dict[str, Any]]:
    bodies = {body["name"]: body[0] for body in _BODY.finditer(ptx)}
    names = demangle([entry["name"] for entry in _ENTRY.finditer(log)])
    rows = []
    for entry in _ENTRY.finditer(log):
        spill = int(entry["stores"]) + int(entry["loads"])
        smem = re.search(r"(\d+) bytes smem", entry["rest"])
        counts = count_instructions(bodies.get(entry["name"], ""))
        problems = [f"spills {spill} bytes"] if spill else []
        if "_row" in names[entry["name"]]:  # the name of kernels that go 16 bytes at a time
            problems += [f"no 16-byte {word}s" for word in ("load", "store")
                         if not counts["ld16" if word == "load" else "st16"]]  # fmt: skip
        rows.append(
            {
                "kernel": f"{path.name}/{names[entry['name']]}",
                "arch": int(entry["arch"]),
                "config": "nvcc",
                "regs": int(entry["regs"]),
                "stack": int(entry["stack"]),
                "spill_bytes": spill,
                "smem": int(smem[1]) if smem else 0,
                "features": [name for name, n in counts.items() if n and name not in ("ld", "st")],
                "counts": counts,
                "problems": problems,
                "ok": not problems,
            }
        )
    return rows


def _cache_path(path: Path, arch: int, nvcc: str) -> Path:
    """The rows of one source on one chip; every header counts as used."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {_version(nvcc)} {arch} {FLAGS} {path.name}".encode())
    headers = [p for p in path.parents[1].rglob("*.h") if p.parent.name in ("common", "cuda")]
    for part in (path, *sorted(headers), Path(__file__)):
        digest.update(part.read_bytes())
    return cache_dir() / f"nvcc-{digest.hexdigest()}.json"


def check_cuda_source(
    path: Path, archs: Iterable[int], nvcc: str, *, use_cache: bool = True
) -> list[dict[str, Any]]:
    """Rows for every `__global__` function of a `.cu` file, from `ptxas -v` and the PTX.

    Raises:
        ValueError: the file does not compile.
    """
    rows: list[dict[str, Any]] = []
    for arch in archs:
        cached = _cache_path(path, arch, nvcc)
        if use_cache and cached.exists():
            rows += [{**row, "cached": True} for row in json.loads(cached.read_text())]
            continue
        found = _rows(path, *_compile(path, arch, nvcc))
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(cached)
        rows += [{**row, "cached": False} for row in found]
    return rows


def cuda_rows(
    archs: Iterable[int], only: Iterable[str] = (), jobs: int = 1, use_cache: bool = True
) -> tuple[list[dict[str, Any]], str]:
    """Rows of csrc/cuda and one line that says what was done about it.

    ``only``: ops whose files are wanted, all by default.
    """
    wanted = tuple(only)
    sources = sorted(p for p in FOLDER.glob("*.cu") if not wanted or p.name.startswith(wanted))
    nvcc = find_nvcc()
    if nvcc is None:
        return [], f"csrc/cuda: {len(sources)} sources not checked, nvcc is not on PATH"
    compiler = nvcc
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [(path, arch) for path in sources for arch in archs]
        results = pool.map(
            lambda task: check_cuda_source(task[0], [task[1]], compiler, use_cache=use_cache), tasks
        )
        rows = [row for found in results for row in found]
    return rows, f"csrc/cuda: {len(sources)} sources checked with {nvcc}"
