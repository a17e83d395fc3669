"""The table printed at the end of a run. It is made from the report alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_kernels.bench.compare import Comparison
from sora_kernels.bench.schema import OURS


def _rate(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> str:
    by_dtype = ceilings.get("matmul_tflops_by_dtype", {})
    matmul = by_dtype.get(row["dtype"], ceilings["matmul_tflops"])
    if row["flops"] / (matmul * 1e9) > row["bytes"] / (ceilings["copy_gbps"] * 1e6):
        return f"{row['tflops']:.3g} TFLOP/s"
    return f"{row['gbps']:.3g} GB/s"


def _speedup(row: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    """How many times faster ours is than this row, from the rounds they shared."""
    if ours is None or row is ours:
        return ""
    interval = ours.get("paired", {}).get(row["provider"])
    if interval is None:
        return f"{row['p50_ms'] / ours['p50_ms']:.2f}x"
    return f"{interval['median']:.2f}x [{interval['low']:.2f}, {interval['high']:.2f}]"


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """One line per row; ``ours is faster by`` is the paired median and its 95% interval."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("case", overflow="fold")
    table.add_column("provider", no_wrap=True)
    for name in ("p50 ms", "rate", "of floor", "peak MB", "ours is faster by"):
        table.add_column(name, justify="right", no_wrap=True)
    ours = {_case(r): r for r in report["rows"] if r["provider"] == OURS}
    previous = None
    for row in report["rows"]:
        name = _case(row)
        per_s = [f"{v:.3g} {k[:-6]}/s" for k, v in row.items() if k.endswith("_per_s")]
        provider = row["provider"] + (f" = {row['variant']}" if "variant" in row else "")
        table.add_row(
            "" if name == previous else name,
            f"[bold]{provider}[/bold]" if provider == OURS else provider,
            f"{row['p50_ms']:.3f}",
            per_s[0] if per_s else _rate(row, report["ceilings"]),
            f"{100 * row['roofline']:.0f}%",
            f"{row['peak_mem_mb']:.1f}",
            _speedup(row, ours.get(name)),
        )
        previous = name
    console.print(table)
    env, ceilings = report["env"], report["ceilings"]
    where = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads"
    console.print(
        f"{where}; torch {env['torch']}; measured ceilings: copy {ceilings['copy_gbps']:.1f} GB/s, "
        f"matmul {ceilings['matmul_tflops']:.3g} TFLOP/s ({ceilings.get('matmul_dtype', '')})",
        highlight=False,
    )
    if device_busy(env):
        console.print(
            f"the machine was busy before the run (load {env['load_before']} on {env['cores']} "
            "cores): trust ratios and their intervals, not milliseconds",
            highlight=False,
        )
    for line in env.get("backends", []):
        if ": reference" in line:  # then "ours" is plain PyTorch too, and its time says little
            console.print(f"not the fast path: {line}", markup=False, highlight=False)
    skipped: dict[tuple[str, str], list[str]] = {}
    for note in env.get("skipped", []):
        skipped.setdefault((note["provider"], note["reason"]), []).append(note["case"])
    for (provider, reason), names in skipped.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases"
        console.print(f"skipped {provider} in {where}: {reason}", markup=False, highlight=False)


def device_busy(env: Mapping[str, Any]) -> bool:
    """Whether other programs held over a quarter of the cores when a CPU run began."""
    return env.get("device") == "cpu" and env.get("load_before", 0) > 0.25 * env["cores"]


def _case(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['mode']} {row['case']} {row['dtype']}"


def print_comparison(result: Comparison, fail_over: float, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("case", overflow="fold")
    for name in ("head / base", "95% interval", "basis", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for change in sorted(result.changes, key=lambda c: -c.low):
        table.add_row(
            change.name,
            f"{change.slowdown:.3f}",
            f"[{change.low:.3f}, {change.high:.3f}]",
            change.basis,
            "[red]SLOWER[/red]" if change.regressed(fail_over) else "",
        )
    console.print(table)
    for title, keys in (
        ("not in HEAD", result.only_base),
        ("new in HEAD", result.only_head),
        ("not comparable (other machine, no control provider)", result.not_comparable),
    ):
        for key in keys:
            console.print(f"{title}: {'/'.join(key)}", markup=False, highlight=False)
