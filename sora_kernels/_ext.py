"""Loads the compiled parts of the package, and remembers why one is missing.

Three shared objects may lie beside this file; each is optional:

- ``_C_cpu.so``   CPU kernels (C++), LibTorch stable ABI, no Python ABI;
- ``_C_cuda.so``  ahead-of-time CUDA kernels, same ABI, only where nvcc was present at build time;
- ``_host``       pybind11 module: packing planner and build facts (one per Python version).

Nothing here raises: a part that cannot be loaded leaves one sentence in :data:`missing`.
"""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent

#: part name -> one sentence saying why it is not there ("_C_cpu", "_C_cuda", "_host")
missing: dict[str, str] = {}


def _load_ops(name: str) -> bool:
    path = _HERE / f"{name}.so"
    if not path.exists():
        missing[name] = f"{path.name} was not built (see SORA_KERNELS_BUILD in README)"
        return False
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        missing[name] = f"{path.name} does not load: {str(error).splitlines()[0]}"
        return False
    return True


def why_no_host(folder: Path, error: ImportError) -> str:
    """One sentence: the module was not built, or for another Python, or does not load."""
    if any((folder / f"_host{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return f"the host module does not load: {str(error).splitlines()[0]}"
    others = sorted(p.name for p in folder.glob("_host.*") if p.suffix in (".so", ".pyd"))
    if others:
        return (
            f"built for another Python: {', '.join(others)}, while this one loads "
            f"_host{EXTENSION_SUFFIXES[0]}; NumPy does its work"
        )
    return "the host module was not built (see SORA_KERNELS_BUILD in README); NumPy does its work"


def _load_host() -> ModuleType | None:
    try:
        return importlib.import_module("sora_kernels._host")
    except ImportError as error:
        missing["_host"] = why_no_host(_HERE, error)
        return None


cpu_loaded: bool = _load_ops("_C_cpu")
# torch.cuda.is_available() is not asked: it starts the CUDA driver, and processes forked after that
# (data loaders) could not use it. Without a device the library loads and is never called.
cuda_loaded: bool = _load_ops("_C_cuda") if torch.version.cuda is not None else False
if torch.version.cuda is None:
    missing["_C_cuda"] = f"torch {torch.__version__} was built without CUDA"
host: ModuleType | None = _load_host()


def cpu_isa() -> str | None:
    """The instruction set that the C++ kernels chose on this machine, or None without them."""
    if not cpu_loaded:
        return None
    names = ("baseline", "avx2", "avx512", "avx512_bf16")
    return names[int(torch.ops.sora_kernels.cpu_isa())]
