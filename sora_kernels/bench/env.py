"""The conditions of a run, recorded with its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: str, *, quick: bool, variables: Iterable[str] = ()) -> dict[str, Any]:
    """What a reader of the results has to know about where they come from.

    ``variables`` are environment variables to record because they change times.
    """
    import torch

    status = _git("status", "--porcelain", "--untracked-files=no")
    env: dict[str, Any] = {
        "device": device,
        "quick": quick,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if status is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pinned": {name: os.environ.get(name) for name in variables},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        env["gpu"] = properties.name
        env["capability"] = f"{properties.major}.{properties.minor}"
        env["cuda"] = torch.version.cuda
        env["driver"] = _nvidia_smi("driver_version")
        env["clocks_sm_mhz"] = _nvidia_smi("clocks.sm")
        env["power_limit_w"] = _nvidia_smi("power.limit")
    return env


def _nvidia_smi(query: str) -> str | None:
    """One read-only query; the GPU's settings are never changed."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def machine(env: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for absolute times of two reports to be comparable at all."""
    return tuple(env.get(name) for name in ("device", "cpu", "cores", "threads", "gpu", "torch"))
