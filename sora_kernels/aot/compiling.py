"""Compiles one case with the installed Triton, and caches what the compiler said."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .case import AotCase

_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Compiled:
    """What the compiler said about one kernel on one chip."""

    ptx: str
    ptxas_log: str
    resources: str
    shared: int


def compile_case(case: AotCase, arch: int) -> Compiled:
    """Compile with the installed Triton for `sm_<arch>`; raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "maxnreg": case.maxnreg,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    # Triton already runs `ptxas -v`; its report is kept only when asked for, and only when the
    # compilation really happens.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        resources = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return Compiled(kernel.asm["ptx"], log.getvalue(), resources, int(kernel.metadata.shared))


def cache_key(case: AotCase, arch: int) -> str:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    constexprs = {k: getattr(v, "cache_key", repr(v)) for k, v in case.constexprs.items()}
    key = [
        _CACHE_FORMAT,
        triton.__version__,
        get_ptxas(arch).version,
        arch,
        case.kernel.cache_key,
        sorted(case.signature.items()),
        sorted(constexprs.items()),
        sorted(case.divisible),
        case.num_warps,
        case.num_stages,
        case.enable_fp_fusion,
        *([case.maxnreg] if case.maxnreg else []),
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def cache_dir() -> Path:
    root = os.environ.get("SORA_KERNELS_CACHE_DIR")
    if root:
        return Path(root) / "aot"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sora_kernels" / "aot"


def cache_path(case: AotCase, arch: int) -> Path:
    return cache_dir() / f"{cache_key(case, arch)}.json.gz"


def load(path: Path) -> Compiled | None:
    try:
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, ValueError, TypeError, EOFError):  # absent, or damaged: compile again
        return None


def save(path: Path, compiled: Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(gzip.compress(json.dumps(vars(compiled)).encode(), 5))
    temporary.replace(path)
