"""What the GPU lane consists of. Standard library only: the lane lists itself anywhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BUILD = (PYTHON, "setup.py", "build_ext", "--inplace")
CEILINGS = """
import json, sys
from sora_kernels.bench import measure_ceilings
from sora_kernels.bench.env import describe
found = {"env": describe("cuda", quick=False), "ceilings": measure_ceilings("cuda").as_dict()}
open(sys.argv[1], "w").write(json.dumps(found, indent=1) + chr(10))
print(found["ceilings"])
"""
# Files of benchmarks in the order of what they show, and the minutes of each once its kernels are
# compiled. What is not named here comes last.
OPS = {"norm_modulate": 0.6, "gate_residual_norm_modulate": 0.6, "gate_residual": 0.6,
       "qk_norm_rope": 0.8, "bias_gelu": 0.4, "rows": 0.6, "norm_silu": 0.6,
       "causal_conv_pad": 0.5, "guided_step": 0.4, "patchify": 0.6, "dispatch": 0.4}  # fmt: skip
ATTENTION = {"packed_attention": 2.5, "windowed_attention": 4.0}
ON_THE_HOST = ("planner",)  # the same on every machine
TUNED = ("norm_modulate", "gate_residual_norm_modulate", "gate_residual", "qk_norm_rope",
         "bias_gelu", "norm_silu", "causal_conv_pad", "guided_step", "patchify")  # fmt: skip
DROPIN = "Wan/*bf16|HunyuanVideo/*bf16|Flux/*bf16|SD3/*bf16"
HANGS = 150  # seconds after which a test is taken for a kernel that never ends


@dataclass(frozen=True)
class Part:
    """Commands run one after another; the first failure ends the part.

    Attributes:
        minutes: how long it should take on an H200 with 16 cores: estimates, none was ever run.
        gpu: whether it needs one.
        missing: a program or package that it needs and that is not here, "" if all are.
        parallel: the commands run side by side, for what waits for compilers.
        always: it is run again even where it ended well before: another machine lacks its results.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    minutes: float = 1.0
    gpu: bool = True
    missing: str = ""
    parallel: bool = False
    always: bool = False


def refuse_wheels(folder: Path) -> str | None:
    """What is wrong with a folder of wheels; what is unpacked comes first on the path."""
    wheels = [path.name for path in folder.glob("*.whl")]
    if not wheels:
        return f"--wheels: expected a folder with *.whl files, got {folder}"
    own = [name for name in wheels if name.startswith(("torch-", "triton-"))]
    if own:
        return f"--wheels: {own[0]} would replace the machine's own: take it out of {folder}"
    return None


def found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tool(name: str) -> str:
    """A program of the CUDA toolkit, which need not be on PATH."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [f"{folder}/{sub}" for folder in folders if folder for sub in ("bin", name)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(paths)) or ""


def workers() -> int:
    """Processes side by side: compiling takes most of the time of a first run."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def _pytest(out: Path, name: str, *what: str) -> tuple[str, ...]:
    """Tests in processes of their own, so that one that kills its CUDA context or hangs costs
    little (`tests/gpu/conftest.py`); in one process where pytest has not the plugins."""
    options: tuple[str, ...] = ("-q", "-m", "gpu", "--durations=10", f"--junitxml={out / name}.xml")
    if found("xdist"):
        options += ("-n", str(workers()), "--dist", "worksteal", "--max-worker-restart=40")
    if found("pytest_timeout"):
        options += (f"--timeout={HANGS}", "--timeout-method=thread")
    return (PYTHON, "-m", "pytest", *what, *options)


def _sanitize(name: str, minutes: float, smallest: Sequence[str]) -> Part:
    """What runs is compiled before, by the part `smallest`: the checker slows a compiler as well.
    PyTorch asks drivers for what they may lack, so errors of API calls are not reported."""
    program = tool("compute-sanitizer")
    command = (program or "compute-sanitizer", "--tool", name, "--error-exitcode", "1",
               "--report-api-errors", "no", *smallest)  # fmt: skip
    missing = "" if program else "compute-sanitizer"
    return Part(f"sanitize-{name}", (command,), minutes, missing=missing)


def _ops() -> list[str]:
    """Files of op benchmarks that time the GPU, the most telling first."""
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    known = [*OPS, *ATTENTION]
    return [*known, *sorted(files - {*known, *ON_THE_HOST})]


def parts(out: Path, quick: bool, wheels: Path | None = None, gpu: bool = True) -> list[Part]:
    """Everything the lane does: whether it is right, how fast it is, how to make it faster."""
    device = "cuda" if gpu else "cpu"
    suffix = ("--quick",) if quick else ()
    smallest = (PYTHON, "-m", "benchmarks.smallest", "--device", device)

    def bench(name: str, minutes: float, *what: str, needs: str = "") -> Part:
        report = ("--json", str(out / f"{name}.json"))
        command = (PYTHON, "-m", "benchmarks", "--device", "cuda", *what, *suffix, *report)
        carried = wheels is not None and any(wheels.glob(f"{needs}-*.whl"))
        missing = "" if not needs or carried or found(needs) else needs
        return Part(name, (command,), minutes, missing=missing)

    def of_file(name: str) -> Part:
        minutes = (OPS | ATTENTION).get(name, 1.0)
        return bench(f"ops-{name}", minutes, "--suite", "ops", "--file", name)

    check = (PYTHON, "-m", "benchmarks", "--device", "cuda", "--quiet", "--check", *suffix)
    checks = tuple((*check, "--file", name) for name in _ops() if name not in ATTENTION)
    files = sorted(f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_gpu_*.py"))
    attention = [name for name in files if name != "tests/gpu/test_gpu_ops.py"]

    def test(name: str, minutes: float, *what: str) -> Part:
        return Part(name, (_pytest(out, name, *what),), minutes)

    tuner = (PYTHON, "-m", "benchmarks.tune", "--out", str(out / "tables"))
    blocks = (PYTHON, "-m", "benchmarks.tune_attention", "--budget", "4", "--jobs", str(workers()),
              "--json", str(out / "tune_attention.json"))  # fmt: skip
    info = f"{PYTHON} -m sora_kernels.info --json > '{out / 'info.json'}'"
    listed = [
        Part("build", (BUILD, ("sh", "-c", info)), 1.5, always=True),
        Part("smallest", (smallest,), 1.0 if gpu else 0.3, gpu=False),
        Part("ceilings", ((PYTHON, "-c", CEILINGS, str(out / "ceilings.json")),), 0.3),
        test("test-ops", 1.5, "tests/gpu/test_gpu_ops.py", "-k", "not graph"),
        test("test-attention", 3.5, *attention),
        test("test-graph", 2.0, "tests/gpu/test_gpu_ops.py", "-k", "graph"),
        Part("check", checks, 1.5, parallel=True),
        *(of_file(name) for name in _ops() if name not in ATTENTION),
        bench("block", 1.5, "--suite", "block"),
        bench("e2e", 3.0, "--suite", "e2e"),
        *(of_file(name) for name in ATTENTION),
        Part("libraries", ((*tuner, "--libraries", str(out / "ops.json")),), 0.2),
        Part("tune-attention", (blocks,), 5.0),
        _sanitize("memcheck", 3.0, smallest),
        _sanitize("racecheck", 4.0, smallest),
        *(Part(f"tune-{op}", ((*tuner, "--op", op, "--budget", "2.5"),), 2.7) for op in TUNED),
        bench("dropin", 8.0, "--suite", "dropin", "--only", DROPIN, needs="diffusers"),
    ]
    if wheels is not None:
        names = sorted(map(str, wheels.glob("*.whl")))
        offline = ("--no-index", "--no-deps", "--upgrade", "--target", str(out / "site"))
        install = (PYTHON, "-m", "pip", "install", "--quiet", *offline, *names)
        listed.insert(0, Part("wheels", (install,), 0.5, gpu=False, always=True))
    return listed


def select(every: list[Part], wanted: Iterable[str]) -> list[Part]:
    """The parts named, or begun by a name: `ops` stands for all of its parts. What prepares a
    machine (``always``) comes along. ValueError if there is no such part."""
    wanted = list(wanted)
    for name in wanted:
        if not any(_named(part, name) for part in every):
            groups = dict.fromkeys(part.name.partition("-")[0] for part in every)
            names = ", ".join([*(part.name for part in every), *groups])
            raise ValueError(f"--part: expected one of {names}, got {name}")
    if not wanted:
        return every
    return [p for p in every if p.always or any(_named(p, name) for name in wanted)]


def _named(part: Part, name: str) -> bool:
    return part.name == name or part.name.startswith(f"{name}-")
