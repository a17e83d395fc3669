"""What the GPU lane consists of. Standard library only: the lane lists itself anywhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
TUNED = ("norm_modulate", "gate_residual_norm_modulate", "gate_residual", "qk_norm_rope",
         "bias_gelu", "norm_silu", "causal_conv_pad", "guided_step", "patchify")  # fmt: skip
CEILINGS = """
import json, sys
from sora_kernels.bench import measure_ceilings
from sora_kernels.bench.env import describe
found = {"env": describe("cuda", quick=False), "ceilings": measure_ceilings("cuda").as_dict()}
open(sys.argv[1], "w").write(json.dumps(found, indent=1) + chr(10))
print(found["ceilings"])
"""


@dataclass(frozen=True)
class Part:
    """Commands run one after another; the first failure ends the part.

    Attributes:
        minutes: how long it should take on an H200, an estimate before it was ever run.
        gpu: whether it needs one.
        missing: a program that it needs and that is not here, "" if all are.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    minutes: float = 1.0
    gpu: bool = True
    missing: str = ""


def refuse_wheels(folder: Path) -> str | None:
    """What is wrong with a folder of wheels; what is unpacked comes first on the path."""
    wheels = [path.name for path in folder.glob("*.whl")]
    if not wheels:
        return f"--wheels: expected a folder with *.whl files, got {folder}"
    own = [name for name in wheels if name.startswith(("torch-", "triton-"))]
    if own:
        return f"--wheels: {own[0]} would replace the machine's own: take it out of {folder}"
    return None


def parts(out: Path, quick: bool, wheels: Path | None = None) -> list[Part]:
    """Everything the lane does, in order."""
    python = sys.executable
    suffix = ("--quick",) if quick else ()

    def bench(name: str, suite: str, minutes: float, *more: str) -> Part:
        report = str(out / f"{name}.json")
        command = (python, "-m", "benchmarks", "--suite", suite, "--device", "cuda", *more)
        return Part(name, (BUILD, (*command, *suffix, "--json", report)), minutes)

    def test(name: str, minutes: float, *what: str) -> Part:
        command = (python, "-m", "pytest", "-q", "-m", "gpu", *what, "--durations=5")
        return Part(name, (BUILD, (*command, f"--junitxml={out / name}.xml")), minutes)

    def sanitize(tool: str, minutes: float) -> Part:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                   "--target-processes", "all", python, "-m", "benchmarks.smallest",
                   "--device", "cuda")  # fmt: skip
        missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer"
        return Part(f"sanitize-{tool}", (BUILD, command), minutes, missing=missing)

    info = f"{python} -m sora_kernels.info --json > {out / 'info.json'}"
    files = sorted(
        path.name for path in (Path(__file__).parents[1] / "tests" / "gpu").glob("test_gpu_*.py")
    )
    attention = [f"tests/gpu/{name}" for name in files if name != "test_gpu_ops.py"]
    ops = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    tuner = (python, "-m", "benchmarks.tune", "--out", str(out / "tables"))
    found = [
        Part("smallest", ((python, "-m", "benchmarks.smallest", "--device", "cpu"),), 0.3, False),
        Part("build", (BUILD, ("sh", "-c", info)), 4),
        Part("ceilings", ((python, "-c", CEILINGS, str(out / "ceilings.json")),), 0.3),
        test("test-ops", 6, "tests/gpu/test_gpu_ops.py", "-k", "not graph"),
        test("test-attention", 5, *attention),
        test("test-suite", 3, "tests/ops"),
        test("graph", 3, "tests/gpu/test_gpu_ops.py", "-k", "graph"),
        sanitize("memcheck", 5),
        sanitize("racecheck", 8),
        *(bench(f"ops-{op}", "ops", 8 if "attention" in op else 3, "--only", op) for op in ops),
        bench("block", "block", 4),
        bench("e2e", "e2e", 6),
        bench("dropin", "dropin", 7),
        *(Part(f"tune-{op}", (BUILD, (*tuner, "--op", op, "--budget", "7")), 7.5) for op in TUNED),
        Part("libraries", ((*tuner, "--libraries", str(out / "ops.json")),), 0.2),
    ]  # fmt: skip
    if wheels is not None:
        names = sorted(map(str, wheels.glob("*.whl")))
        offline = ("--no-index", "--no-deps", "--upgrade", "--target", str(out / "site"))
        install = (python, "-m", "pip", "install", *offline, *names)
        found.insert(0, Part("wheels", (install,), 0.5, gpu=False))
    return found


def select(every: list[Part], wanted: Iterable[str]) -> list[Part]:
    """The parts named, or begun by a name: `ops` stands for all of its parts. ValueError if
    there is no such part."""
    wanted = list(wanted)
    for name in wanted:
        if not any(_named(part, name) for part in every):
            groups = dict.fromkeys(part.name.partition("-")[0] for part in every)
            names = ", ".join([*(part.name for part in every), *groups])
            raise ValueError(f"--part: expected one of {names}, got {name}")
    return [p for p in every if any(_named(p, name) for name in wanted)] if wanted else every


def _named(part: Part, name: str) -> bool:
    return part.name == name or part.name.startswith(f"{name}-")
