"""Reads registers, spills, memory accesses and matrix instructions out of compiler output."""

from __future__ import annotations

import re
from typing import Any

from .case import AotCase
from .compiling import Compiled

# Dynamic shared memory one block may ask for, in bytes (CUDA programming guide, "technical
# specifications per compute capability", less the 1 KiB the system keeps). Triton checks this at
# launch only, so a kernel over the limit "compiles".
SMEM_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}

# What a tl.dot should become.
MATRIX_UNIT = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma",
    100: "tcgen05",
    103: "tcgen05",
    120: "mma.sync",
}

_ACCESS = re.compile(r"\b(ld|st)(?:\.\w+)*\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfus](\d+)\s")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_RESOURCE = re.compile(r"REG:(\d+) STACK:(\d+)")


def count_instructions(ptx: str) -> dict[str, int]:
    """Global loads and stores, 16-byte ones among them, matrix instructions, async copies."""
    counts = dict.fromkeys(
        ("ld", "ld16", "st", "st16", "wgmma", "tcgen05", "mma.sync", "cp.async", "tma", "trap"), 0
    )
    for kind, vector, bits in _ACCESS.findall(ptx):
        counts[kind] += 1
        counts[f"{kind}16"] += int(vector or 1) * int(bits) >= 128
    copies = re.findall(r"cp\.async\.c[ag]\.shared[\w:]*\.global[^;]*?,\s*(0x10|16)\b", ptx)
    bulk_loads = len(re.findall(r"cp\.async\.bulk[\w.]*\.shared::\w+\.global", ptx))
    bulk_stores = len(re.findall(r"cp\.async\.bulk[\w.]*\.global\.shared::", ptx))
    counts["cp.async"] = len(re.findall(r"\bcp\.async\.c[ag]\.", ptx))
    counts["tma"] = bulk_loads + bulk_stores
    counts["ld"] += counts["cp.async"] + bulk_loads
    counts["ld16"] += len(copies) + bulk_loads
    counts["st"] += bulk_stores
    counts["st16"] += bulk_stores
    counts["wgmma"] = len(re.findall(r"\bwgmma\.mma_async\.", ptx))
    counts["tcgen05"] = len(re.findall(r"\btcgen05\.mma\.", ptx))
    counts["mma.sync"] = len(re.findall(r"\bmma\.sync\.", ptx))
    counts["trap"] = len(re.findall(r"^\s*trap;", ptx, re.MULTILINE))
    return counts


def check(case: AotCase, arch: int, compiled: Compiled) -> dict[str, Any]:
    """Numbers, features and problems of one compiled kernel, as a row without its names."""
    spills = _SPILL.findall(compiled.ptxas_log)
    resources = _RESOURCE.findall(compiled.resources)
    if not spills or not resources:
        raise RuntimeError("ptxas -v or cuobjdump did not report registers and spills")
    spill_bytes = sum(int(stores) + int(loads) for stores, loads in spills)
    counts = count_instructions(compiled.ptx)
    problems = []
    if spill_bytes:
        problems.append(f"spills {spill_bytes} bytes")
    if compiled.shared > SMEM_LIMIT[arch]:
        problems.append(f"shared memory {compiled.shared} > {SMEM_LIMIT[arch]} bytes")
    if not counts["st"]:
        problems.append("trap only" if counts["trap"] else "stores nothing")
    elif case.memory_bound:
        if not counts["ld16"]:
            problems.append("no 16-byte loads")
        if not counts["st16"] and not case.narrow_store_ok:
            problems.append("no 16-byte stores")
    unit = MATRIX_UNIT[arch]
    if counts["st"] and counts[unit] < case.dots and not case.fma_ok:
        problems.append(f"{counts[unit]} {unit} for {case.dots} dots")
    if counts["st"] and counts["tma"] < case.descriptors:
        problems.append(f"{counts['tma']} TMA copies for {case.descriptors} descriptor loads")
    if "wgmma.mma_async instructions are serialized" in compiled.ptxas_log:
        problems.append("wgmma serialised")
    return {
        "regs": max(int(regs) for regs, _ in resources),
        "stack": max(int(stack) for _, stack in resources),
        "spill_bytes": spill_bytes,
        "smem": compiled.shared,
        "features": [name for name, n in counts.items() if n and name not in ("ld", "st")],
        "counts": counts,
        "problems": problems,
        "ok": not problems,
    }
