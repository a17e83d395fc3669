"""The CUDA kernels of csrc/cuda, compiled by a C++ compiler and run on the CPU, fiber by fiber.

Kernels *and* bindings are the very sources that nvcc and the C++ compiler see in a CUDA build;
`cuda_runtime.h` and its neighbours stand for the toolkit. The raw ops `<op>_fwd_cuda` and
`<op>_bwd_cuda` then exist for CPU tensors as `torch.ops.sora_kernels_emulated.*`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sora_kernels import backend

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda_emulator"
NAMESPACE = "sora_kernels_emulated"
# As in setup.py's CUDA build, products and sums are rounded one by one.
FLAGS = "-O1 -std=c++20 -fPIC -ffp-contract=off -fvisibility=hidden -DSORA_EMULATED"

_library: torch.library.Library | None = None
_symbols: ctypes.CDLL | None = None


def compiler() -> str | None:
    """The C++ compiler, or None. Only GCC and Clang know the attributes that are used here."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _newest_header() -> float:
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    return max(path.stat().st_mtime for path in headers)


def build() -> Path:
    """Compiles what has changed since the last call and returns the library."""
    base = Path(torch.__file__).parent
    include = f"-I{HERE} -I{ROOT}/csrc/common"
    binding = f"-I{base}/include -DTORCH_TARGET_VERSION=0x020b000000000000"
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = _newest_header()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.c*")) + [HERE / "emulator.cpp"]
    objects, running = [], []
    for source in sources:
        target = BUILD / f"{source.name}.o"
        objects.append(target)
        if target.exists() and target.stat().st_mtime > max(headers, source.stat().st_mtime):
            continue
        flags = f"{FLAGS} {include} {'' if source.suffix == '.cu' else binding} -x c++ -c"
        command = [str(compiler()), *flags.split(), str(source), "-o", f"{target}.{os.getpid()}"]
        running.append((target, subprocess.Popen(command)))
    for target, process in running:
        if process.wait() != 0:
            raise RuntimeError(f"{target.stem} does not compile for the emulator")
        Path(f"{target}.{os.getpid()}").replace(target)
    library = BUILD / "_C_cuda_emulated.so"
    if running or not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        link = f"-L{base}/lib -ltorch -ltorch_cpu -lc10"
        subprocess.run(
            [str(compiler()), "-shared", *map(str, objects), *link.split(), "-o", str(fresh)],
            check=True,
        )
        fresh.replace(library)
    return library


def load() -> None:
    """Builds the library if need be and registers its ops, with the schemas of the real ones."""
    global _library, _symbols
    if _library is not None:
        return
    path = build()
    _library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in backend.cuda_ops():
        schema = str(getattr(torch.ops.sora_kernels, op).default._schema)
        _library.define(schema.split("::", 1)[1])
    torch.ops.load_library(str(path))
    _symbols = ctypes.CDLL(str(path))


def raw(op: str, direction: str) -> Callable[..., Any]:
    """The emulated raw op, e.g. ``raw("norm_modulate", "fwd")``."""
    load()
    return getattr(getattr(torch.ops, NAMESPACE), f"{op}_{direction}_cuda").default


@contextmanager
def emulated() -> Iterator[None]:
    """In here the public functions, autograd included, run the CUDA kernels on CPU tensors."""
    load()

    def implementation(op: str, direction: str, chosen: str, tensor: Any) -> Callable[..., Any]:
        return raw(op, direction)

    with mock.patch.object(backend, "implementation", implementation), backend.use_backend("native"):
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
