"""Fills the tables of the documents from result files: `python -m benchmarks.readme [--check]`.

Between `<!-- table NAME -->` and `<!-- end -->` nothing is written by hand. `--check` writes
nothing and fails if a document does not match the files.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
OURS = "sora_kernels"
# README shows one size of each op, beyond the cache; docs/benchmarks.md shows all.
HEADLINE = re.compile(
    r"16384x1152 R=8$|16384x16x72|joint|4096x4608|x90x160|^mixed|tile$|^100000 |x\d+x\d+ "
)


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


def conditions(report: Mapping[str, Any]) -> str:
    env, ceilings = report["env"], report["ceilings"]
    where = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads"
    return (
        f"{where}; torch {env['torch']}; {env['date'][:10]}, commit `{str(env['commit'])[:9]}`; "
        f"measured in the same run: copy {ceilings['copy_gbps']:.1f} GB/s, matmul "
        f"{1000 * ceilings['matmul_tflops']:.0f} GFLOP/s."
    )


def against(row: Mapping[str, Any], other: str) -> str:
    """Paired ratio with its 95% interval; above 1: ours is faster."""
    interval = row.get("paired", {}).get(other)
    if interval is None:
        return "-"
    return f"{interval['median']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def timings(suite: str, cases: re.Pattern[str] | None = None) -> str:
    """Ours against plain and compile, one line per case (of those whose name matches)."""
    report = load(RESULTS / f"{suite}.json")
    if report is None:
        return "Not measured yet."
    rows = [
        [
            f"{row['op']} {row['case']} {row['dtype']} {row['mode']}",
            f"{row['p50_ms']:.2f}",
            f"{100 * row['roofline']:.0f}%",
            against(row, "plain"),
            against(row, "compile"),
        ]
        for row in report["rows"]
        if row["provider"] == OURS
        and row["op"] != "dispatch"
        and (cases is None or cases.search(row["case"]))
    ]
    header = ("case", "ours, ms", "of floor", "faster than plain", "faster than compile")
    return table(header, rows) + "\n\n" + conditions(report)


def dispatch() -> str:
    """What a call costs besides its kernel, as a multiple of the bare op's cost."""
    report = load(RESULTS / "ops.json")
    if report is None:
        return "Not measured yet."
    rows = [
        [
            f"{row['case']} {row['mode']}",
            f"{1e3 * row['p50_ms']:.0f}",
            f"{1 / row['paired']['bare']['median']:.2f}",
        ]
        for row in report["rows"]
        if row["op"] == "dispatch" and row["provider"] == OURS
    ]
    return table(("case", "ours, us", "over the bare op"), rows)


def end_to_end() -> str:
    """Every provider of the mixed-size cases, and how much faster ours is."""
    report = load(RESULTS / "e2e.json")
    if report is None:
        return "Not measured yet."
    ours = {(r["op"], r["case"], r["dtype"]): r for r in report["rows"] if r["provider"] == OURS}
    rows = []
    for row in report["rows"]:
        name = row["provider"] + (f" ({row['variant']})" if "variant" in row else "")
        rate = next((v for k, v in row.items() if k.endswith("_per_s")), None)
        rows.append(
            [
                f"{row['op']} {row['case']} {row['dtype']}: {name}",
                f"{row['p50_ms']:.0f}",
                "-" if rate is None else f"{rate:.2f}",
                ""
                if row["provider"] == OURS
                else against(ours[row["op"], row["case"], row["dtype"]], row["provider"]),
            ]
        )
    header = ("way", "ms", "clips/s", "ours is faster by")
    return table(header, rows) + "\n\n" + conditions(report)


def dropin() -> str:
    """Blocks of diffusers: milliseconds of every way, and the patched block against upstream's."""
    report = load(RESULTS / "dropin.json")
    if report is None:
        return "Not measured yet."
    times = {(r["case"], r["dtype"], r["mode"], r["provider"]): r["p50_ms"] for r in report["rows"]}
    ways = ("plain", "compile", OURS, "patched_compile")
    rows = []
    for row in report["rows"]:
        if row["provider"] == OURS:
            key = (row["case"], row["dtype"], row["mode"])
            found = [times.get((*key, way)) for way in ways]
            rows.append(
                [
                    " ".join(key),
                    *("-" if ms is None else f"{ms:.0f}" for ms in found),
                    against(row, "plain"),
                ]
            )
    header = (
        "block", "upstream, ms", "compiled", "accelerated", "accelerated + compiled",
        "accelerated is faster than upstream",
    )  # fmt: skip
    return table(header, rows) + "\n\n" + conditions(report)


def scores() -> str:
    """What the oracle reads in generated clips."""
    report = load(ROOT / "model" / "results" / "evaluate.json")
    if report is None:
        return "Not measured yet."

    def rate(row: Mapping[str, Any], of: str, name: str) -> str:
        value = row[of][name]
        return f"{100 * value['rate']:.0f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"

    rows = [
        [
            f"{row['name']} ({row['size']}, {row['frames']} frames, n={row['clips']})",
            *(rate(row, "generated", name) for name in ("shape", "colour", "direction", "all")),
            f"{100 * row['vae_round_trip']['all']['rate']:.0f}%",
            f"{100 * row['true_clip']['all']['rate']:.0f}%",
            f"{100 * row['chance']:.1f}%",
        ]
        for row in report["rows"]
    ]
    header = (
        "prompts",
        "shape",
        "colour",
        "direction",
        "all",
        "VAE ceiling",
        "true clip",
        "chance",
    )
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "ops": lambda: timings("ops", HEADLINE),
    "all_ops": lambda: timings("ops"),
    "dispatch": dispatch,
    "block": lambda: timings("block"),
    "e2e": end_to_end,
    "dropin": dropin,
    "scores": scores,
}


def fill(text: str) -> str:
    """The document with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"table: expected one of {sorted(TABLES)}, got {name!r}")
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    for path in DOCUMENTS:
        text = path.read_text()
        filled = fill(text)
        if filled == text:
            continue
        if "--check" in argv:
            print(f"{path.name} does not match the result files: run python -m benchmarks.readme",
                  file=sys.stderr)  # fmt: skip
            return 1
        beside = path.with_suffix(".md.new")
        beside.write_text(filled)
        os.replace(beside, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
