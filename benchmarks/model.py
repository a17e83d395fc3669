"""`python -m benchmarks model`: what each kernel should take on GPUs that are not here.

From a kernel's registers, shared memory and warps (as cross-compiled) follows how many of its
thread blocks a multiprocessor holds, from that how many waves a launch has. A wave takes the
longest of

- its bytes over the bandwidth, times the share of it that a copy reaches,
- the FLOPs of the multiprocessor with the most blocks, over its rate times the reachable share,
- the steps of a program's loop, one after another: each takes the latency of its loads, unless they
  were issued during the steps before it, and what its barriers take.

A launch is the sum of its waves, the last of which may be part empty, plus the cost of a launch.
This is a model with assumptions (`ASSUMED`), not a measurement: a copy or matrix rate measured on
the GPU replaces the assumed share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .model_gpus import GPUS, Gpu, find
from .model_work import Kernel, Launch, launches

ROOT = Path(__file__).parent
AOT = ROOT / "model_aot.json"
RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Assumed:
    """What no compiler and no datasheet says."""

    copy_share: float = 0.9  # of the datasheet's bandwidth, by a copy
    matrix_share: float = 0.7  # of the datasheet's matrix rate, by an attention kernel
    vector_share: float = 0.5  # of the fp32 rate: half of the instructions are no multiply-adds
    latency_us: float = 0.8  # from a load's issue to its use, under load
    step_us: float = 0.3  # of a loop over tokens: a row reduced over a program's warps, and stored
    launch_us: float = 2.0  # from the end of one kernel to the first load of the next


ASSUMED = Assumed()


def occupancy(kernel: Kernel, gpu: Gpu) -> int:
    """Thread blocks of a kernel that one multiprocessor holds at a time; 0 if not one fits.

    Registers are handed out per warp in units of 256, shared memory with 1 KB for the system
    (CUDA occupancy calculator).
    """
    warps = kernel["warps"]
    registers = -(-kernel["regs"] * 32 // 256) * 256 * warps
    smem = kernel["smem"] + 1024
    return min(gpu.registers // registers, gpu.smem // smem, gpu.warps // warps, gpu.blocks)


def floor_us(bytes: float, flops: float, matrix: bool, gpu: Gpu) -> float:
    """The least time at the datasheet's rates."""
    rate = gpu.bf16_tflops if matrix else gpu.fp32_tflops
    return max(bytes / gpu.gbps / 1e3, flops / rate / 1e6)


def launch_us(launch: Launch, gpu: Gpu, assumed: Assumed = ASSUMED) -> float:
    """The modelled time of a launch; inf if the kernel does not fit on the chip."""
    resident = occupancy(launch.kernel, gpu)
    if resident == 0:
        return float("inf")
    bandwidth = gpu.gbps * 1e3 * assumed.copy_share  # bytes per microsecond
    if launch.matrix:
        rate = gpu.bf16_tflops * assumed.matrix_share
    else:
        rate = gpu.fp32_tflops * assumed.vector_share
    per_sm = rate * 1e6 / gpu.sms  # FLOPs per microsecond
    bytes, flops = launch.bytes / launch.programs, launch.flops / launch.programs

    waits = 1 if launch.pipelined else launch.steps
    steps = waits * assumed.latency_us + (launch.steps - 1) * assumed.step_us

    def wave(programs: int) -> float:
        busiest = -(-programs // gpu.sms)
        return max(
            programs * bytes / bandwidth,
            busiest * flops / per_sm,
            steps,
        )

    full, rest = divmod(launch.programs, resident * gpu.sms)
    waves = full * wave(resident * gpu.sms) + (wave(rest) if rest else 0.0)
    return waves + assumed.launch_us


def read_kernels(path: Path = AOT) -> dict[int, dict[str, Kernel]]:
    """Compiled kernels by architecture and name; ValueError if the file is not what it should."""
    try:
        rows = json.loads(path.read_text())["rows"]
        found: dict[int, dict[str, Kernel]] = {}
        for row in rows:
            found.setdefault(row["arch"], {})[row["kernel"]] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the model's kernels, got {error!r}") from None
    return found


def compact(aot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `python -m sora_kernels.aot --json`, cut down to what the model reads."""
    rows = []
    for row in aot["rows"]:
        words = dict(word.split("=", 1) for word in row["config"].split() if "=" in word)
        if "warps" not in words or not row["ok"]:  # nvcc's kernels, and what does not compile
            continue
        blocks = {
            name: int(words[name])
            for name in words
            if name.startswith("BLOCK") or name in ("TOKENS", "HEADS", "STAGES")
        }
        name = row["kernel"].partition("_sm")[0]  # one kernel may have a config per architecture
        facts = {"warps": int(words["warps"]), "regs": row["regs"], "smem": row["smem"]}
        rows.append({"kernel": name, "arch": row["arch"], **facts, **blocks})
    return rows


def lookup(kernels: Mapping[str, Kernel]) -> Callable[[str], Kernel]:
    def find_kernel(name: str) -> Kernel:
        if name not in kernels:
            raise ValueError(f"{name} is not among the compiled kernels: refresh {AOT.name}")
        return kernels[name]

    return find_kernel


def predict(
    cases: Iterable[Mapping[str, Any]],
    gpu: Gpu,
    kernels: Mapping[str, Kernel],
    assumed: Assumed = ASSUMED,
) -> list[dict[str, Any]]:
    """A row for every case that the model covers; rows of a report serve as cases."""
    rows = []
    for case in cases:
        found = launches(case, lookup(kernels))
        if found is None:
            continue
        matrix = any(launch.matrix for launch in found)
        floor = floor_us(case["bytes"], case["flops"], matrix, gpu)
        heaviest = max(found, key=lambda launch: launch_us(launch, gpu, assumed))
        resident = occupancy(heaviest.kernel, gpu)
        us = sum(launch_us(launch, gpu, assumed) for launch in found)
        memory = case["bytes"] / gpu.gbps / 1e3
        rows.append(
            {
                **{name: case[name] for name in ("op", "mode", "case", "dtype", "bytes", "flops")},
                "gpu": gpu.name,
                "bound": "memory" if memory >= floor else "arithmetic",
                "floor_us": round(floor, 3),
                "predicted_us": round(us, 3) if us != float("inf") else None,
                "share": round(floor / us, 3),
                "launches": len(found),
                "kernel": heaviest.kernel["kernel"],
                "regs": heaviest.kernel["regs"],
                "smem": heaviest.kernel["smem"],
                "warps_per_sm": resident * heaviest.kernel["warps"],
                "occupancy": round(resident * heaviest.kernel["warps"] / gpu.warps, 3),
                "waves": round(heaviest.programs / max(1, resident * gpu.sms), 2),
            }
        )
    return rows


def gpu_cases() -> list[dict[str, Any]]:
    """What the benchmarks would measure on a GPU. Declaring a case allocates nothing."""
    from .registry import Context, load

    names = ("op", "mode", "case", "dtype", "bytes", "flops")
    cases = load(["ops"], Context(device="cuda"))
    return [{name: getattr(case, name) for name in names} for case in cases]


def calibrated(gpu: Gpu, ceilings: Mapping[str, Any]) -> Assumed:
    """The assumptions with the copy rate that was measured; a matrix product of a library says
    what the chip can do, not what attention can, and scales the assumed share."""
    matrix = ceilings.get("matmul_tflops_by_dtype", {}).get("bf16", gpu.bf16_tflops)
    return Assumed(
        copy_share=ceilings["copy_gbps"] / gpu.gbps,
        matrix_share=ASSUMED.matrix_share * min(1.0, matrix / gpu.bf16_tflops),
    )


def against_measured(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured milliseconds of our rows of a report.

    On a GPU of the table by the model, with the ceilings of the report. On a CPU, of which there
    is no model, the floor at the measured ceilings stands for the prediction.
    """
    ours = [row for row in report["rows"] if row["provider"] == "sora_kernels"]
    ours = [row for row in ours if row["op"] not in ("dispatch", "planner")]
    if report["env"]["device"] == "cpu":
        return [
            {**row, "predicted_ms": row["roofline"] * row["p50_ms"], "basis": "ceiling"}
            for row in ours
        ]
    gpu = find(report["env"]["gpu"])
    kernels = read_kernels()[gpu.compiled]
    assumed = calibrated(gpu, report["ceilings"])
    rows = []
    for row in ours:
        for found in predict([row], gpu, kernels, assumed):
            if found["predicted_us"]:
                rows.append({**row, "predicted_ms": found["predicted_us"] / 1e3, "basis": "model"})
    return rows


def plot(rows: Sequence[Mapping[str, Any]], path: Path, note: str) -> Path:
    """Predicted over measured on logarithmic axes, a colour for each op."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sora_kernels.bench.plot import COLOURS, OTHER_COLOURS, save

    if not rows:
        raise ValueError("plot: expected at least one row that is both measured and predicted")
    figure = Figure(figsize=(6.4, 6))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    palette = (*OTHER_COLOURS, *COLOURS.values(), "#57606a", "#bc4c00", "#4c2889", "#116329")
    for index, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        mine = [row for row in rows if row["op"] == op]
        for mode, marker in (("fwd", "o"), ("bwd", "^"), ("fwd+bwd", "s")):
            points = [(r["p50_ms"], r["predicted_ms"]) for r in mine if r["mode"] == mode]
            if points:
                axes.loglog(
                    *zip(*points, strict=True), marker, color=palette[index % len(palette)],
                    label=op if mode == mine[0]["mode"] else None, markersize=5, alpha=0.8,
                )  # fmt: skip
    ends = [f(v for r in rows for v in (r["p50_ms"], r["predicted_ms"])) for f in (min, max)]
    line = [ends[0] * 0.7, ends[1] * 1.4]
    axes.loglog(line, line, "-", color="#57606a", linewidth=0.8)
    axes.set_xlabel("measured, ms")
    modelled = rows[0]["basis"] == "model"
    axes.set_ylabel("predicted, ms" if modelled else "floor at the measured ceilings, ms")
    title = "Static model against measurement" if modelled else "Floor against measurement (CPU)"
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    text = f"circle forward, triangle backward, square both\n{note}"
    figure.text(0.01, -0.03, text, fontsize=6, color="#57606a")
    return save(figure, path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'case':72} {'MB':>8} {'GFLOP':>9} {'floor us':>9} {'model us':>9} {'share':>5} "
        f"{'regs':>4} {'warps':>5} {'waves':>7}"
    ]
    for row in rows:
        name = f"{row['op']} {row['mode']} {row['case']}"
        predicted = row["predicted_us"]
        lines.append(
            f"{name:72} {row['bytes'] / 1e6:8.1f} {row['flops'] / 1e9:9.1f} "
            f"{row['floor_us']:9.1f} {predicted if predicted else float('inf'):9.1f} "
            f"{row['share']:5.2f} {row['regs']:4} {row['warps_per_sm']:5} {row['waves']:7.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command; 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", action="append", metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--only", metavar="OP", help="this op alone")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG",
        help="draw predicted against measured, where results are committed",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="F.json", help="results to draw")
    parser.add_argument(
        "--refresh", type=Path, metavar="AOT.json",
        help="first take the kernels from this report of python -m sora_kernels.aot",
    )  # fmt: skip
    options = parser.parse_args(argv)
    from sora_kernels.bench.plot import caption
    from sora_kernels.bench.schema import read_report, write_text

    try:
        if options.plot:
            report = read_report(options.results or RESULTS / "cpu" / "ops.json")
            print(plot(against_measured(report), options.plot, caption(report)))
            return 0
        if options.refresh:
            rows = compact(json.loads(options.refresh.read_text()))
            text = ",\n  ".join(json.dumps(row) for row in rows)
            write_text(AOT, f'{{"rows": [\n  {text}\n]}}\n')
        kernels = read_kernels()
        gpus = [find(name) for name in options.gpu] if options.gpu else list(GPUS.values())
        cases = gpu_cases()
        if options.only:
            cases = [case for case in cases if case["op"] == options.only]
        if not cases:
            raise ValueError(f"--only: no benchmark of an op {options.only!r}")
        found = {gpu.name: predict(cases, gpu, kernels[gpu.compiled]) for gpu in gpus}
        if options.json:
            written = {
                "assumed": asdict(ASSUMED),
                "gpus": {name: asdict(GPUS[name]) for name in found},
                "rows": [row for rows in found.values() for row in rows],
            }
            write_text(options.json, json.dumps(written, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, rows in found.items():
        print(f"\n{name}: modelled, not measured (see python -m benchmarks model --help)")
        print(table(rows))
    return 0
