"""The CUDA kernels of csrc/cuda, compiled by a C++ compiler and run on the CPU, fiber by fiber.

Kernels *and* bindings are the very sources that nvcc and the C++ compiler see in a CUDA build;
`cuda_runtime.h` and its neighbours stand for the toolkit. The raw ops `<op>_fwd_cuda` and
`<op>_bwd_cuda` then exist for CPU tensors as `torch.ops.sora_kernels_emulated.*`, schemas included.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sora_kernels import backend

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda_emulator"
NAMESPACE = "sora_kernels_emulated"
BAND, BAND_VALUE = 64, 12288.0  # those of csrc/cuda/bind.h
# As in setup.py's CUDA build, products and sums are rounded one by one. The attributes in use here
# are those of GCC and Clang.
FLAGS = (
    "-std=c++20 -fPIC -ffp-contract=off -fvisibility=hidden -w -DSORA_EMULATED "
    f"-I{HERE} -I{ROOT}/csrc/common -I{ROOT}/csrc/cuda -x c++ -c"
)

_symbols: ctypes.CDLL | None = None


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise RuntimeError("the emulator needs a C++ compiler")
    return found


def _compile(sources: Sequence[Path], library: Path, link: str = "") -> Path:
    """Compiles what has changed since the last time; processes wait for each other."""
    torch_include = Path(torch.__file__).parent / "include"
    binding = f"-O0 -I{torch_include} -DTORCH_TARGET_VERSION=0x020b000000000000"
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects, running = [], []
        started = time.time()
        for source in sources:
            target = BUILD / f"{source.name}.o"
            objects.append(str(target))
            fresh = target.exists() and target.stat().st_mtime
            if fresh and fresh > max(newest, source.stat().st_mtime):
                continue
            has_torch = source.parent.name == "cuda" and source.suffix == ".cpp"
            flags = f"{binding if has_torch else '-O1'} {FLAGS}"
            target.unlink(missing_ok=True)
            command = [compiler(), *flags.split(), str(source), "-o", str(target)]
            running.append((source, subprocess.Popen(command)))
        failed = [source.name for source, process in running if process.wait() != 0]
        for source, _ in running:  # what is saved while a compiler runs is newer than its result
            if source.name not in failed:
                os.utime(BUILD / f"{source.name}.o", (started, started))
        if failed:
            raise RuntimeError(f"{', '.join(failed)}: does not compile for the emulator")
        if running or not library.exists():
            temporary = library.with_suffix(".new")
            command = [compiler(), "-shared", *objects, *link.split(), "-o", str(temporary)]
            subprocess.run(command, check=True)
            temporary.replace(library)
    return library


def build() -> Path:
    """The library of all CUDA kernels and bindings."""
    lib = Path(torch.__file__).parent / "lib"
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.c*")), HERE / "emulator.cpp"]
    return _compile(sources, BUILD / "_C_cuda_emulated.so", f"-L{lib} -ltorch -ltorch_cpu -lc10")


def build_toy() -> Path:
    """The library of toy.cu."""
    return _compile([HERE / "toy.cu", HERE / "emulator.cpp"], BUILD / "toy.so")


def load() -> None:
    """Builds the library if need be and registers its ops."""
    global _symbols
    if _symbols is not None:
        return
    path = build()
    torch.ops.load_library(str(path))
    _symbols = ctypes.CDLL(str(path))


def raw(op: str, direction: str) -> Callable[..., Any]:
    """The emulated raw op, e.g. ``raw("norm_modulate", "fwd")``; its results lie between bands."""
    load()
    run = getattr(getattr(torch.ops, NAMESPACE), f"{op}_{direction}_cuda").default

    def checked(*args: Any) -> Any:
        results = run(*args)
        for i, result in enumerate(results):
            assert_bands(result, f"{op}_{direction}, result {i}")
        return results

    return checked


def assert_bands(result: Tensor, name: str) -> None:
    """Nothing was written beside a result that the emulated bindings allocated."""
    whole = result.new_empty(0).set_(result.untyped_storage())
    start, stop = BAND, whole.numel() - BAND
    assert (result.storage_offset(), result.numel()) == (start, stop - start), name
    for band in (whole[:start], whole[stop:]):
        assert (band == BAND_VALUE).all(), f"{name}: written outside"


@contextmanager
def emulated() -> Iterator[None]:
    """In here the public functions, autograd included, run the CUDA kernels on CPU tensors."""
    load()

    def implementation(op: str, direction: str, chosen: str, tensor: Any) -> Callable[..., Any]:
        return raw(op, direction)

    with (
        mock.patch.object(backend, "implementation", implementation),
        backend.use_backend("native"),
    ):
        yield


@contextmanager
def backwards() -> Iterator[None]:
    """In here the threads of a block run from the last to the first: races change results."""
    load()
    assert _symbols is not None
    _symbols.sora_emulator_order(1)
    try:
        yield
    finally:
        _symbols.sora_emulator_order(0)
