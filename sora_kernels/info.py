"""What is built, what can run here, and why the rest cannot (`python -m sora_kernels.info`)."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from . import _ext, backend, ops

_PARTS = {
    "_C_cpu": "C++ CPU kernels",
    "_C_cuda": "ahead-of-time CUDA kernels",
    "_host": "host module",
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> tuple[str | None, str]:
    """Version, and one sentence why it cannot be used ("" if it can)."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed (there are wheels for Linux only)"
    try:
        return str(importlib.import_module("triton").__version__), ""
    except Exception as error:  # a broken install may raise anything on import
        return None, f"triton does not import: {type(error).__name__}: {error}".splitlines()[0]


def _nvcc() -> tuple[str | None, str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if path is None:
        return None, "nvcc was not found (needed only to build csrc/cuda)"
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvcc does not run: {error}"
    found = re.search(r"release ([\d.]+)", output.stdout)
    return (f"{found[1]} ({path})", "") if found else (None, f"{path} does not say its version")


def _compiled() -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    loaded = {"_C_cpu": _ext.cpu_loaded, "_C_cuda": _ext.cuda_loaded, "_host": bool(_ext.host)}
    for name, title in _PARTS.items():
        why_not = "" if loaded[name] else _ext.missing.get(name, "not built")
        parts[name] = {"title": title, "loaded": loaded[name], "why_not": why_not}
    parts["_C_cpu"]["isa"] = _ext.cpu_isa()
    return parts


def _devices() -> list[dict[str, Any]]:
    cpu = {"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    found = [cpu]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append({
            "device": f"cuda:{i}", "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        })  # fmt: skip
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _no_cuda() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "torch was built with CUDA but sees no device"


def op_names() -> list[str]:
    """The ops of this package, by folder."""
    return sorted(m.name for m in pkgutil.iter_modules(ops.__path__) if m.ispkg)


def _op(name: str) -> dict[str, dict[str, Any]]:
    importlib.import_module(f"{ops.__name__}.{name}")
    result = {}
    for device, order in (("cpu", ("native",)), ("cuda", ("triton", "native"))):
        why_not = {b: backend.why_not(name, b, device) for b in backend.BACKENDS}
        result[device] = {
            "backend": next((b for b in order if why_not[b] is None), "reference"),
            "why_not": {b: reason for b, reason in why_not.items() if reason is not None},
        }
    return result


def collect() -> dict[str, Any]:
    """Everything the command prints, as one JSON-serialisable dict.

    Keys: `versions`, `tools`, `compiled` (per part: loaded, why_not), `devices`, `ops` (per op and
    device type: the backend that would run, and why the others would not) and `missing`, one
    sentence for each thing that is not there.
    """
    triton, no_triton = _triton()
    nvcc, no_nvcc = _nvcc()
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    compiled = _compiled()
    sentences = [no_triton, _no_cuda(), no_nvcc]
    sentences += [f"{part['title']}: {part['why_not']}" for part in compiled.values()
                  if not part["loaded"]]  # fmt: skip
    if compiler is None:
        sentences.append("no C++ compiler was found (needed only to build csrc)")
    return {
        "versions": {
            "sora_kernels": _version("sora-kernels") or "not installed (running from a checkout)",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": triton,
            "numpy": _version("numpy"),
            "platform": platform.platform(),
        },
        "tools": {"c++": compiler, "nvcc": nvcc, "ninja": shutil.which("ninja")},
        "compiled": compiled,
        "devices": _devices(),
        "interpreting": backend.interpreting(),
        "ops": {name: _op(name) for name in op_names()},
        "missing": [sentence for sentence in sentences if sentence],
    }


def report(facts: dict[str, Any]) -> str:
    """The same for people."""
    versions = facts["versions"]
    lines = [f"sora_kernels {versions['sora_kernels']}"]
    lines.append(
        f"  python {versions['python']}, torch {versions['torch']} "
        f"(CUDA {versions['torch_cuda'] or 'no'}), triton {versions['triton'] or 'no'}, "
        f"numpy {versions['numpy'] or 'no'}"
    )
    lines += ["", "compiled parts"]
    for part in facts["compiled"].values():
        isa = f", {part['isa']}" if part.get("isa") else ""
        state = f"loaded{isa}" if part["loaded"] else f"no: {part['why_not']}"
        lines.append(f"  {part['title']:27} {state}")
    lines += ["", "devices"]
    for device in facts["devices"]:
        extra = f"{device['threads']} threads" if "threads" in device else (
            f"capability {device['capability']}, {device['memory_gib']} GiB")  # fmt: skip
        lines.append(f"  {device['device']:7} {device['name']}, {extra}")
    if facts["interpreting"]:
        lines.append("  TRITON_INTERPRET is set: Triton kernels run in the interpreter, on the CPU")
    here = any(device["device"].startswith("cuda") for device in facts["devices"])
    lines += ["", f"{'op':28} {'cpu':10} cuda{'' if here else ' (no such device here)'}"]
    reasons: dict[str, list[str]] = {}
    for name, devices in facts["ops"].items():
        lines.append(f"  {name:26} {devices['cpu']['backend']:10} {devices['cuda']['backend']}")
        for device, choice in devices.items():
            fast = "native" if device == "cpu" else "triton"
            if choice["backend"] == "reference":
                key = f"reference on {device}, not {fast}: {choice['why_not'][fast]}"
                reasons.setdefault(key, []).append(name)
    lines += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if facts["missing"]:
        lines += ["", "not here"] + [f"  {sentence}" for sentence in facts["missing"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=1) if args.json else report(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
