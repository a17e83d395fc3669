"""A model that calls our ops, in a process without Python.

    python tests/packaging/without_python.py [--keep DIR]

Exports the module of `tests/test_without_python.py`, compiles it with AOTInductor, compiles
`without_python.cpp` against torch's headers (about half a minute of one core), runs it with our CPU
library, and compares its results with those of this process, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.jit._pickle import build_tensorlist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.test_without_python import LIBRARY, QUICK, Sublayer  # noqa: E402


def compile_main(out: Path) -> None:
    base = Path(torch.__file__).parent
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    include = [f"-I{base}/include", f"-I{base}/include/torch/csrc/api/include"]
    libraries = [f"-L{base}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{base}/lib"]
    source = str(HERE / "without_python.cpp")
    command = [compiler, "-std=c++20", "-O0", *include, source, "-o", str(out), *libraries, "-ldl"]
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the files go, and stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        package, given, result, program = (
            folder / file for file in ("block.pt2", "inputs.pt", "results.pt", "without_python")
        )
        torch.manual_seed(0)
        inputs = (torch.randn(2, 24, 72), torch.randn(2, 24, 72), torch.randn(3, 2, 72))
        with torch.no_grad():
            exported = torch.export.export(Sublayer(), inputs)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(package), inductor_configs=QUICK
            )
        torch.save(list(inputs), given)
        started = time.perf_counter()
        compile_main(program)
        print(f"{program.name} compiled in {time.perf_counter() - started:.0f} s")
        linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
        assert "libpython" not in linked and "libtorch_python" not in linked, linked
        subprocess.run([program, LIBRARY, package, given, result], check=True, env={})
        with torch.serialization.safe_globals([build_tensorlist]):
            results = torch.load(result)
        pairs = zip(results, Sublayer()(*inputs), strict=True)
        equal = [torch.equal(got, expected) for got, expected in pairs]
        print(f"torch {torch.__version__}, no Python: results equal bit by bit: {equal}")
        return int(not all(equal))


if __name__ == "__main__":
    sys.exit(main())
