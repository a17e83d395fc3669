"""Which blocks, warps and stages of our attention kernels are the fastest on this GPU.

`python -m benchmarks.tune_attention [--only GLOB] [--budget MINUTES] [--json F]` compiles the
candidates of each kernel (forward, dq, dk and dv; dense and windowed; heads of 64, 72, 96, 128) in
processes side by side, and times each against the launch in use, round by round, on one long
sequence and under one window. A candidate whose result differs is refused. It changes nothing: what
is faster beyond doubt is printed, and belongs into `sora_kernels/ops/*_attention/config.py`, where
blocks are a formula of head dim, dtype and chip, so that every machine sums in one order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window
from sora_kernels.bench import measure_cuda, paired_ratio
from sora_kernels.bench.schema import write_text
from sora_kernels.ops.packed_attention.config import Config, Launch, chip_of
from sora_kernels.ops.packed_attention.work import work_list

from .registry import TOLERANCE
from .runner import relative_error

KINDS = ("fwd", "dq", "dkv")
OPS = ("packed_attention", "windowed_attention")
HEAD_DIMS = (128, 64, 72, 96)
WINDOW = Window((3, 3, 3))
ADOPT = 1.02  # the lower end of the interval of the speedup must exceed it
GROUPS = (4, 16, 64)  # query (or key) blocks per head before the next head
# (query rows, key rows, warps, stages); on sm_90 most of them compile without spills.
BLOCKS: Mapping[str, Sequence[tuple[int, int, int, int]]] = {
    "fwd": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 64, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    "dq": [
        (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3),
        (64, 128, 4, 2), (64, 32, 4, 3),
    ],
    "dkv": [
        (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2),
        (32, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 3),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    op: str
    kind: str
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.kind} hd{self.head_dim}"


def kernels(pattern: str | None) -> list[Kernel]:
    every = [Kernel(op, kind, d) for d in HEAD_DIMS for op in OPS for kind in KINDS]
    return [k for k in every if pattern is None or fnmatch(k.name, pattern)]


def candidates(kernel: Kernel, now: Launch) -> list[Launch]:
    """Other blocks first, then the order of the heads, then pointers in place of descriptors."""
    blocks = [
        Launch(*numbers, group=now.group, descriptors=now.descriptors)
        for numbers in BLOCKS[kernel.kind]
    ]
    groups = [now._replace(group=group) for group in GROUPS]
    return [
        launch
        for launch in dict.fromkeys([*blocks, *groups, now._replace(descriptors=False)])
        if launch != now
    ]


def _modules(op: str) -> tuple[Any, Any, Any]:
    from sora_kernels.ops.packed_attention import config, kernels, kernels_bwd
    from sora_kernels.ops.windowed_attention import config as config_w
    from sora_kernels.ops.windowed_attention import kernels as kernels_w
    from sora_kernels.ops.windowed_attention import kernels_bwd as kernels_bwd_w

    return (config, kernels, kernels_bwd) if op == OPS[0] else (config_w, kernels_w, kernels_bwd_w)


def in_use(kernel: Kernel, chip: tuple[int, int]) -> Launch:
    config = _modules(kernel.op)[0].choose_config(kernel.head_dim, torch.bfloat16, chip)
    launch: Launch = getattr(config, kernel.kind)
    return launch


class Bench:
    """One kernel on one sequence: `run(launch)` is a call by that launch."""

    def __init__(self, kernel: Kernel, heads: int, parts: Sequence[Any], device: str) -> None:
        self.kernel = kernel
        self.layout = PackedLayout([list(parts)], order="tile", device=device)
        n = self.layout.num_tokens
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        made = torch.randn(n, 4, heads, kernel.head_dim, device=device).to(dtype)
        self.q, self.k, self.v, self.dout = made.unbind(1)
        self.config, self.forward, self.backward = _modules(kernel.op)
        self.default: Config = self.config.choose_config(kernel.head_dim, dtype, chip_of(self.q))
        self.now: Launch = getattr(self.default, kernel.kind)
        self.saved = self._call(self.default, "fwd") if kernel.kind != "fwd" else ()

    def _work(self, block: int, side: str) -> Tensor:
        if self.kernel.op == OPS[1]:
            return self.layout.window_work(block, WINDOW, "key" if side == "key" else "query")
        return work_list(self.layout.cu_seqlens, self.layout.num_tokens, block)

    def _call(self, config: Config, kind: str) -> tuple[Tensor, ...]:
        return self._prepared(config, kind)()

    def _prepared(self, config: Config, kind: str) -> Callable[[], tuple[Tensor, ...]]:
        """The raw call; its work list exists before the clock runs."""
        cu, n = self.layout.cu_seqlens, self.layout.num_tokens
        scale = self.kernel.head_dim**-0.5
        windowed = self.kernel.op == OPS[1]
        inner: tuple[Any, ...] = (cu, self.layout.window_table()) if windowed else (cu, cu)
        outer: tuple[Any, ...] = (WINDOW.as_ints(), scale) if windowed else (n, n, scale, False)
        block = config.dkv.block_n if kind == "dkv" else getattr(config, kind).block_m
        work = self._work(block, "key" if kind == "dkv" else "query")
        if kind == "fwd":
            args: tuple[Any, ...] = (self.q, self.k, self.v, *inner, work, *outer)
            module, function = self.forward, self.forward.forward
        else:
            lists = (None, work) if kind == "dkv" else (work, None)
            args = (self.dout, None, self.q, self.k, self.v, *self.saved, *inner, *lists, *outer,
                    kind == "dq", kind == "dkv")  # fmt: skip
            module, function = self.backward, self.backward.backward

        def call() -> tuple[Tensor, ...]:
            with patch.object(module, "config_for", lambda q: config):
                return tuple(x for x in function(*args) if x.numel())

        return call

    def run(self, launch: Launch) -> Callable[[], tuple[Tensor, ...]]:
        kind = self.kernel.kind
        others: dict[str, Any] = {kind: launch}
        return self._prepared(replace(self.default, **others), kind)


LONG = (8192, 24), (Text(64), Grid(16, 32, 48, tile=(4, 8, 8)))
SMALL = (256, 1), (Grid(2, 8, 16, tile=(2, 8, 8)),)


def bench(kernel: Kernel, size: Any, device: str = "cuda") -> Bench:
    (tokens, heads), clip = size
    parts = clip if kernel.op == OPS[1] else (Text(tokens),)
    return Bench(kernel, heads, parts, device)


def warm(job: tuple[Kernel, Launch]) -> str:
    """Compiles a candidate into Triton's cache, in a process of its own; says what went wrong."""
    kernel, launch = job
    try:
        bench(kernel, SMALL).run(launch)()
        torch.cuda.synchronize()
    except Exception as problem:  # spills too much to launch, or does not compile
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:80]}"
    return ""


def shown(launch: Launch) -> str:
    m, n, warps, stages, group, descriptors = launch[:6]
    return f"{m}x{n} warps={warps} stages={stages} group={group}" + " pointers" * (not descriptors)


def compared(
    bench: Bench, launches: Sequence[Launch], timer: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """A row per candidate: its speedup over the launch in use, or why it was refused."""
    now = bench.run(bench.now)
    expected = now()
    for launch in launches:
        row: dict[str, Any] = {"kernel": bench.kernel.name, "launch": shown(launch)}
        candidate = bench.run(launch)
        try:
            error = relative_error(candidate(), expected)
        except Exception as problem:
            yield {**row, "refused": type(problem).__name__}
            continue
        if not error <= TOLERANCE["bf16"]:
            yield {**row, "refused": f"differs by {error:.1e}"}
            continue
        samples = timer({"now": now, "candidate": candidate})
        faster = paired_ratio(samples["now"], samples["candidate"])
        yield {
            **row, "ms": 1e3 * sorted(samples["candidate"])[len(samples["candidate"]) // 2],
            "faster": faster.median, "interval": [faster.low, faster.high],
        }  # fmt: skip


def tune(pattern: str | None, seconds: float, jobs: int) -> list[dict[str, Any]]:
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    chosen = kernels(pattern)
    chip = torch.cuda.get_device_capability()
    lists = {k: candidates(k, in_use(k, chip)) for k in chosen}
    pairs = [(k, launch) for k in chosen for launch in (in_use(k, chip), *lists[k])]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context))
        failures = dict(zip(pairs, pool.map(warm, pairs), strict=True))
    for kernel in chosen:
        if time.monotonic() > end:
            print("out of budget: the rest was not timed")
            break
        for launch in lists[kernel]:
            if failures[kernel, launch]:
                print(f"{kernel.name}: {shown(launch)}: refused, {failures[kernel, launch]}")
        long = bench(kernel, LONG)
        print(f"{kernel.name}: in use {shown(long.now)}")
        launches = [launch for launch in lists[kernel] if not failures[kernel, launch]]
        for row in compared(long, launches, lambda runs: measure_cuda(runs, seconds=0.15)):
            rows.append(row)
            result = row.get("refused") or (
                f"{row['ms']:.3f} ms, {row['faster']:.3f} "
                f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
            )
            print(f"  {row['launch']}: {result}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_attention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", metavar="GLOB", help="kernels, as --list prints them")
    parser.add_argument("--list", action="store_true", help="print the kernels and candidates")
    parser.add_argument("--budget", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    options = parser.parse_args(argv)
    chosen = kernels(options.only)
    problem = (
        f"--only: expected a kernel as --list prints them, got {options.only}" if not chosen
        else f"--budget: expected minutes above 0, got {options.budget:g}" if options.budget <= 0
        else f"--jobs: expected at least 1, got {options.jobs}" if options.jobs < 1
        else "measuring needs an NVIDIA GPU; --list does not"
        if not (options.list or torch.cuda.is_available()) else ""
    )  # fmt: skip
    if problem:
        print(f"benchmarks.tune_attention: {problem}", file=sys.stderr)
        return 2
    if options.list:
        for kernel in chosen:
            now = in_use(kernel, (9, 0))
            print(f"{kernel.name}: on sm_90 {shown(now)}")
            for launch in candidates(kernel, now):
                print(f"  {shown(launch)}")
        return 0
    rows = tune(options.only, 60 * options.budget, options.jobs)
    best = [row for row in rows if row.get("interval", (0, 0))[0] > ADOPT]
    for _, group in itertools.groupby(best, key=lambda row: row["kernel"]):
        row = max(group, key=lambda row: row["faster"])
        print(f"faster: {row['kernel']}: {row['launch']}, {row['faster']:.3f}")
    if options.json:
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
