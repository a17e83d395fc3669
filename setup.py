"""Builds the compiled parts of sora_kernels through ninja. Project metadata is in pyproject.toml.

SORA_KERNELS_BUILD chooses what is built:
    auto  (default) the CPU library and the host module if there is a C++ compiler; the CUDA
          library too if this torch was built with CUDA and nvcc is found
    cpu   the CPU library and the host module; an error if that fails
    cuda  all three; an error if nvcc is not there (never a quiet CPU-only build). A torch without
          CUDA will do: the library is then for the machines that have one
    none  nothing: pure Python (Triton on CUDA, PyTorch references elsewhere)

MAX_JOBS limits parallel compilations; TORCH_CUDA_ARCH_LIST chooses GPU architectures. No GPU is
probed and nothing is downloaded. The ops libraries use LibTorch's stable ABI: one binary serves
every torch from 2.11 on and every Python; only the host module (pybind11) depends on Python.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020b000000000000"  # torch 2.11
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": ""}
if IS_X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
    )
    ISA_FLAGS["avx512_bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16"
# Kernel files for which the bf16 conversion of that last one is worth another compilation.
BF16_KERNELS = (
    "bias_gelu_kernels",
    "guided_step_kernels",
    "norm_modulate_kernels",
    "norm_silu_group_kernels",
    "norm_silu_rms_kernels",
    "qk_norm_rope_kernels",
)
# -ffp-contract=off: a fused multiply-add would skip a rounding that a law may ask for.
CXX_FLAGS = (
    "-O3 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wno-unknown-pragmas "
    "-Wno-maybe-uninitialized -Wno-uninitialized"  # GCC 12 warns of its own immintrin.h
)
# Binaries for these, which other chips of their generations run as well (8.6, 8.9, 10.3, 12.1), and
# PTX for chips between (that of 8.0) and after them (that of 12.0).
CUDA_ARCHES = "8.0+PTX;9.0;10.0;12.0+PTX"
NVCC_FLAGS = "-O3 -std=c++20 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden"


def mode() -> str:
    value = os.environ.get("SORA_KERNELS_BUILD", "auto")
    if value not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"SORA_KERNELS_BUILD: expected auto, cpu, cuda or none, got {value!r}")
    return value


def compiler() -> str | None:
    wish = os.environ.get("CXX")
    if wish:
        return wish
    return next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)


def cuda_home() -> Path | None:
    wish = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if wish:
        return Path(wish)
    nvcc = shutil.which("nvcc")
    return Path(nvcc).resolve().parent.parent if nvcc else None


def gencode(nvcc: Path) -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, else for those of CUDA_ARCHES that this nvcc knows."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wish:
        command = [str(nvcc), "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True).stdout.split()
        wish = [a for a in CUDA_ARCHES.split(";") if f"compute_{_digits(a)}" in known]
    codes = []
    for arch in wish:
        number = _digits(arch)
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(codes)


def _digits(arch: str) -> str:
    return arch.removesuffix("+PTX").replace(".", "")


def cuda_sources() -> list[Path]:
    folder = ROOT / "csrc" / "cuda"
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def host_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "host").glob("*.cpp"))


def why_no_cuda(build: str) -> str | None:
    import torch

    if build == "auto" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        return "nvcc was not found (set CUDA_HOME)"
    return None


def extensions() -> list[Extension]:
    build = mode()
    if build == "none":
        return []
    if compiler() is None:
        if build == "auto":
            print("sora_kernels: no C++ compiler found, building without compiled parts")
            return []
        sys.exit("SORA_KERNELS_BUILD: a C++ compiler (g++ or clang++, or CXX) is needed")
    found = [Extension("sora_kernels._C_cpu", [])]
    if host_sources():
        found.append(Extension("sora_kernels._host", []))
    if build in ("auto", "cuda"):
        reason = why_no_cuda(build)
        if reason is None:
            found.append(Extension("sora_kernels._C_cuda", []))
        elif build == "cuda":
            sys.exit(f"SORA_KERNELS_BUILD=cuda: {reason}")
        else:
            print(f"sora_kernels: building without CUDA: {reason}")
    return found


class Ninja:
    """A build.ninja file in the making: compile edges, one link edge per shared object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler -shared $in $flags -o $out",
        ]

    def compile(self, source: Path, flags: str, compiler: str, tag: str = "") -> str:
        target = f"{source.parent.name}_{source.stem}{tag}.o"
        self.lines += [
            f"build {target}: compile {source}",
            f"  compiler = {compiler}",
            f"  flags = {flags}",
        ]
        return target

    def link(self, objects: list[str], target: Path, flags: str, compiler: str) -> None:
        self.lines += [
            f"build {target}: link {' '.join(objects)}",
            f"  compiler = {compiler}",
            f"  flags = {flags}",
        ]

    def run(self, *targets: Path) -> None:
        """Builds the targets, or all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = ["ninja", "-C", str(self.folder)]
        if shutil.which("ninja") is None:
            command[:1] = [sys.executable, "-m", "ninja"]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        command += [str(target) for target in targets]
        subprocess.run(command, check=True)


class BuildExt(build_ext):
    """setuptools' build_ext with ninja in place of its own compiler driver."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2].startswith("_C_"):  # no Python ABI in the ops libraries
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        ninja = Ninja(Path(self.build_temp).resolve() / "ninja")
        targets = {}
        adders = {"_C_cpu": self.add_cpu, "_host": self.add_host, "_C_cuda": self.add_cuda}
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            targets[extension.name] = target
            target.parent.mkdir(parents=True, exist_ok=True)
            adders[extension.name.rpartition(".")[2]](ninja, target)
        try:
            ninja.run()
        except (subprocess.CalledProcessError, FileNotFoundError):
            if mode() != "auto":
                raise
            built = {name for name, target in targets.items() if self.builds(ninja, name, target)}
            self.extensions[:] = [e for e in self.extensions if e.name in built]

    def builds(self, ninja: Ninja, name: str, target: Path) -> bool:
        """Whether this part can be built where not all can: an nvcc at odds with the C++ compiler
        does not take the CPU library with it."""
        try:
            ninja.run(target)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"sora_kernels: {name} failed to build and is left out: {error}")
            return False
        return True

    def add_cpu(self, ninja: Ninja, target: Path) -> None:
        import torch

        base = Path(torch.__file__).parent
        cxx = str(compiler())
        flags = f"{CXX_FLAGS} -I{ROOT}/csrc/common" + (" -DSORA_X86" if IS_X86 else "")
        torch_flags = f"{flags} -std=c++20 -I{base}/include -DTORCH_TARGET_VERSION={STABLE_ABI}"
        objects = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernels"):  # no torch headers; once per instruction set
                for isa, isa_flags in ISA_FLAGS.items():
                    if isa == "avx512_bf16" and source.stem not in BF16_KERNELS:
                        continue
                    kernel_flags = f"{flags} -std=c++17 -DSORA_ISA={isa} {isa_flags}"
                    objects.append(ninja.compile(source, kernel_flags, cxx, f"_{isa}"))
            else:
                objects.append(ninja.compile(source, torch_flags, cxx))
        ninja.link(objects, target, f"-L{base}/lib -ltorch -ltorch_cpu -lc10", cxx)

    def add_host(self, ninja: Ninja, target: Path) -> None:
        import pybind11

        cxx = str(compiler())
        python = sysconfig.get_paths()["include"]
        flags = f"{CXX_FLAGS} -std=c++17 -I{pybind11.get_include()} -I{python}"
        objects = [ninja.compile(source, flags, cxx) for source in host_sources()]
        link = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        ninja.link(objects, target, link, cxx)

    def add_cuda(self, ninja: Ninja, target: Path) -> None:
        import torch

        base = Path(torch.__file__).parent
        cxx = str(compiler())
        home = cuda_home()
        assert home is not None  # why_no_cuda
        nvcc = f"{home}/bin/nvcc -ccbin {shlex.quote(cxx)}"
        kernel_flags = f"{NVCC_FLAGS} -I{ROOT}/csrc/common {gencode(home / 'bin' / 'nvcc')}"
        binding_flags = (
            f"{CXX_FLAGS} -I{ROOT}/csrc/common -std=c++20 -I{base}/include -DUSE_CUDA "
            f"-DTORCH_TARGET_VERSION={STABLE_ABI}"
        )
        objects = []
        for source in cuda_sources():
            if source.suffix == ".cu":  # no torch headers
                objects.append(ninja.compile(source, kernel_flags, nvcc, "_cu"))
            else:  # no CUDA headers
                objects.append(ninja.compile(source, binding_flags, cxx))
        # The CUDA runtime is linked in, and where torch has CUDA its libtorch needs libtorch_cuda,
        # through which the current stream is found: nothing here names a version of CUDA.
        libraries = f"-L{base}/lib -ltorch -ltorch_cpu -lc10"
        link = f"-cudart static -Xlinker --no-as-needed,--exclude-libs=ALL {libraries}"
        ninja.link(objects, target, link, nvcc)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
