"""The JSON of a benchmark run, schema 1: how it is made, checked, written and read."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .ceilings import Ceilings
from .timing import paired_ratio, quantile

SCHEMA = 1
MODES = ("fwd", "bwd", "fwd+bwd")
DTYPES = ("fp32", "bf16", "fp16")
OURS = "sora_kernels"

_TEXT = ("suite", "op", "mode", "case", "dtype", "provider")
_POSITIVE = ("p20_ms", "p50_ms", "p80_ms")
_NOT_NEGATIVE = ("bytes", "flops", "gbps", "tflops", "roofline", "peak_mem_mb")
KEY = ("suite", "op", "mode", "case", "dtype", "provider")
"""What identifies a row within a report."""


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def make_row(
    *,
    suite: str,
    op: str,
    mode: str,
    case: str,
    dtype: str,
    provider: str,
    samples_ms: Sequence[float],
    bytes: int,
    flops: int,
    ceilings: Ceilings,
    peak_mem_mb: float,
    paired_with: Mapping[str, Sequence[float]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of a report.

    Beyond the required keys it holds ``samples_ms`` (every round), and, where ``paired_with``
    gives other providers' samples of the same rounds, ``paired``: other -> the interval of
    ``other's time / this one's time``, so that 2.0 means "twice as fast as the other".
    """
    p50 = quantile(samples_ms, 0.5)
    row: dict[str, Any] = {
        "suite": suite,
        "op": op,
        "mode": mode,
        "case": case,
        "dtype": dtype,
        "provider": provider,
        "p20_ms": quantile(samples_ms, 0.2),
        "p50_ms": p50,
        "p80_ms": quantile(samples_ms, 0.8),
        "bytes": int(bytes),
        "flops": int(flops),
        "gbps": bytes / p50 / 1e6,
        "tflops": flops / p50 / 1e9,
        "roofline": ceilings.floor_ms(bytes, flops, dtype) / p50,
        "peak_mem_mb": peak_mem_mb,
        "samples_ms": [float(f"{t:.6g}") for t in samples_ms],
    }
    if paired_with:
        row["paired"] = {
            other: paired_ratio(times, samples_ms).as_dict() for other, times in paired_with.items()
        }
    row.update(extra or {})
    return row


def _fail(where: str, expected: str, got: object) -> None:
    raise ValueError(f"{where} must be {expected}, got {got!r}")


def _number(where: str, value: object, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _fail(where, "a finite number", value)
    elif value < 0 or (positive and value == 0):
        _fail(where, "positive" if positive else "not negative", value)


def _validate_row(where: str, row: object) -> None:
    if not isinstance(row, dict):
        _fail(where, "an object", row)
        return
    missing = [n for n in (*_TEXT, *_POSITIVE, *_NOT_NEGATIVE) if n not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for name in _TEXT:
        if not isinstance(row[name], str) or not row[name]:
            _fail(f"{where}.{name}", "a non-empty string", row[name])
    if row["mode"] not in MODES:
        _fail(f"{where}.mode", f"one of {', '.join(MODES)}", row["mode"])
    if row["dtype"] not in DTYPES:
        _fail(f"{where}.dtype", f"one of {', '.join(DTYPES)}", row["dtype"])
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        _number(f"{where}.{name}", row[name], positive=name in _POSITIVE)
    if not row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]:
        times = (row["p20_ms"], row["p50_ms"], row["p80_ms"])
        _fail(where, "ordered p20_ms <= p50_ms <= p80_ms", times)
    for index, value in enumerate(row.get("samples_ms", ())):
        _number(f"{where}.samples_ms[{index}]", value, positive=True)
    for other, interval in row.get("paired", {}).items():
        for name in ("median", "low", "high"):
            _number(f"{where}.paired.{other}.{name}", interval.get(name), positive=True)


def validate(report: object) -> None:
    """Raises ``ValueError``, naming the place, unless ``report`` is a schema 1 report.

    Keys beyond the schema are allowed.
    """
    if not isinstance(report, dict):
        _fail("the report", "a JSON object", type(report).__name__)
        return
    if report.get("schema") != SCHEMA:
        _fail("schema", str(SCHEMA), report.get("schema"))
    if not isinstance(report.get("env"), dict):
        _fail("env", "an object", report.get("env"))
    ceilings = report.get("ceilings")
    if not isinstance(ceilings, dict):
        _fail("ceilings", "an object", ceilings)
        return
    for name in ("copy_gbps", "matmul_tflops"):
        _number(f"ceilings.{name}", ceilings.get(name), positive=True)
    rows = report.get("rows")
    if not isinstance(rows, list) or not rows:
        _fail("rows", "a list with at least one row", rows)
        return
    seen: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        _validate_row(f"rows[{index}]", row)
        first = seen.setdefault(row_key(row), index)
        if first != index:
            raise ValueError(f"rows[{index}] repeats rows[{first}]: {' / '.join(row_key(row))}")


def write_text(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames, so that nobody ever sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Validates ``report`` and writes it to ``path`` in one step."""
    validate(report)
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)
    # One row per line: a report of hundreds of rows stays readable and its diffs too.
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    write_text(Path(path), f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads and validates; every failure is a ``ValueError`` that names the file."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        validate(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return report
