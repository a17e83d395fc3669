"""Large pictures and videos through the reference stack: `python -m benchmarks.sizes --json F`.

Time and peak memory of each stage, one process for each: encoding and decoding in tiles, and one
step of the DiT with windows (the shipped weights; a picture of this size was never trained on, so
nothing is said about quality). Fails when a stage needs more memory than BOUND_MB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .pinned import PINNED, pin

BOUND_MB = 4096
SIZES = {  # width, height, frames
    "image 2048x2048": (2048, 2048, 1),
    "video 1920x1080": (1920, 1080, 9),
    "video 1080x1920": (1080, 1920, 9),
}
STAGES = ("encode", "denoise", "decode")
WINDOW = (3, 3, 3)


def stage(name: str, size: tuple[int, int, int]) -> tuple[Callable[[], Any], int]:
    """A call of the stage, and the tokens or latents that it works on."""
    import torch

    from model.dit import DiT
    from model.generate import CHECKPOINT, load_stack
    from model.tiling import decode_tiled, encode_tiled
    from model.vae import latent_shape
    from sora_kernels import Grid, PackedLayout, Text

    torch.manual_seed(0)
    width, height, frames = size
    stack = load_stack(CHECKPOINT)
    t, h, w = latent_shape(frames, height, width)
    if name == "encode":
        video = torch.rand(1, 3, frames, height, width) * 2 - 1
        return lambda: encode_tiled(stack.vae, video), t * h * w
    latent = torch.randn(1, stack.dit.config.channels, t, h, w)
    if name == "decode":
        return lambda: decode_tiled(stack.vae, latent), t * h * w
    config = dataclasses.replace(stack.dit.config, window=WINDOW)
    model = DiT(config).eval().requires_grad_(False)
    model.load_state_dict(stack.dit.state_dict())
    pt, ph, pw = config.patch
    layout = PackedLayout([[Text(8), Grid(t // pt, h // ph, w // pw)]], **config.layout)
    words, times = torch.arange(8), torch.tensor([0.7])
    return lambda: model([latent[0]], layout, words, times), layout.num_tokens


def peak_mb() -> float:
    """The most memory that this process ever held, in MB, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("/proc/self/status: expected a line VmHWM, found none")
    return int(found[1]) / 1024


def child(name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Runs one stage in this process."""
    call, tokens = stage(name, size)
    before = peak_mb()
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "peak_mb": round(peak_mb()),
        "before_mb": round(before),
    }


def run_all(sizes: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Every stage of every size, each in a process of its own."""
    rows = []
    for case, size in sizes.items():
        for name in STAGES:
            numbers = ",".join(map(str, size))
            command = [sys.executable, "-m", "benchmarks.sizes", "--child", name, numbers]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{case}, {name}: {done.stderr.strip().splitlines()[-1]}")
            row = {"case": case, "stage": name, **json.loads(done.stdout)}
            rows.append(row)
            print(
                f"{case:16} {name:8} {row['tokens']:>7} tokens {row['seconds']:8.1f} s "
                f"{row['peak_mb']:>6} MB",
                flush=True,
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    parser.add_argument("--json", metavar="F", type=Path, help="the report")
    parser.add_argument("--only", choices=sorted(SIZES), help="one size")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        name, numbers = options.child
        width, height, frames = map(int, numbers.split(","))
        print(json.dumps(child(name, (width, height, frames))))
        return 0
    if options.json is None:
        parser.error("--json: expected a file")
    from model.checkpoint import write_json
    from sora_kernels.bench.env import describe

    rows = run_all({k: v for k, v in SIZES.items() if options.only in (None, k)})
    env = describe("cpu", quick=False, variables=PINNED)
    write_json(options.json, {"schema": 1, "env": env, "bound_mb": BOUND_MB, "rows": rows})
    over = [
        f"{r['case']}, {r['stage']}: {r['peak_mb']} MB" for r in rows if r["peak_mb"] > BOUND_MB
    ]
    for line in over:
        print(f"benchmarks.sizes: over the bound of {BOUND_MB} MB: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    if "--child" not in sys.argv and os.environ.get("OMP_NUM_THREADS") is None:
        pin(sys.argv[1:], "benchmarks.sizes")
    sys.exit(main())
