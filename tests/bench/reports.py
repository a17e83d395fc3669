"""Reports made up for tests, small and valid."""

from __future__ import annotations

from typing import Any

from sora_kernels.bench import Ceilings, make_row

CEILINGS = Ceilings(copy_gbps=10.0, matmul_tflops=0.1, matmul_dtype="fp32", by_dtype={"fp32": 0.1})
JITTER = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0)


def report(
    ours_ms: float, plain_ms: float | None, *, op: str = "norm_modulate", **env: Any
) -> dict[str, Any]:
    ours = [ours_ms * j for j in JITTER]
    plain = None if plain_ms is None else [plain_ms * j for j in reversed(JITTER)]
    common: dict[str, Any] = {
        "suite": "ops",
        "op": op,
        "mode": "fwd",
        "case": "16x32",
        "dtype": "fp32",
        "bytes": 1_000_000,
        "flops": 1_000,
        "ceilings": CEILINGS,
        "peak_mem_mb": 0.5,
    }
    paired = {} if plain is None else {"plain": plain}
    rows = [make_row(**common, provider="sora_kernels", samples_ms=ours, paired_with=paired)]
    if plain is not None:
        rows.append(make_row(**common, provider="plain", samples_ms=plain))
    return {
        "schema": 1,
        "env": {"device": "cpu", "cpu": "x", "cores": 2, "threads": 2, "torch": "2", **env},
        "ceilings": CEILINGS.as_dict(),
        "rows": rows,
    }
