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

from benchmarks import studies
from benchmarks.scores import certificate, expansion, headline_scores, scores

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "families", "benchmark", "studies")),
)
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
OURS = "sora_kernels"
# README shows one size of each op, beyond the cache; docs/benchmarks.md shows all.
HEADLINE = re.compile(
    r"16384x1152 R=8$|16384x16x72|joint|4096x4608|x90x160|^mixed|tile$|x\d+x\d+ |^window"
)
SHOWN = (
    "norm_modulate", "gate_residual", "gate_residual_norm_modulate", "qk_norm_rope",
    "packed_attention", "bias_gelu", "patchify", "unpatchify", "causal_conv_pad", "norm_silu",
    "guided_step",
)  # fmt: skip


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


def timings(suite: str) -> str:
    """Ours against plain and compile, one line per case."""
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
        if row["provider"] == OURS and row["op"] != "dispatch"
    ]
    header = ("case", "ours, ms", "of floor", "faster than plain", "faster than compile")
    return table(header, rows) + "\n\n" + conditions(report)


def ratios(suite: str, keep: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> str:
    """One line per case: how many times faster ours is than plain / than compile."""
    report = load(RESULTS / f"{suite}.json")
    if report is None:
        return "Not measured yet."
    found: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        if row["provider"] == OURS and keep(row):
            intervals = [row.get("paired", {}).get(other) for other in ("plain", "compile")]
            shown = " / ".join("-" if i is None else f"{i['median']:.2f}" for i in intervals)
            way = f"{row['dtype']} {row['mode']}"
            found.setdefault(f"{row['op']} {row['case']}", {})[way] = shown
    columns = sorted({way for ways in found.values() for way in ways}, key=_way_order)
    rows = [[case, *(ways.get(way, "-") for way in columns)] for case, ways in found.items()]
    return table(("case", *columns), rows) + "\n\n" + conditions(report)


def _way_order(way: str) -> tuple[int, int]:
    dtype, mode = way.split()
    return ("fp32", "bf16", "fp16").index(dtype), ("fwd", "bwd", "fwd+bwd").index(mode)


def headline(row: Mapping[str, Any]) -> bool:
    return row["op"] in SHOWN and HEADLINE.search(row["case"]) is not None


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


def ways() -> str:
    """How many times faster ours is than each other way, one line a way."""
    report = load(RESULTS / "e2e.json")
    if report is None:
        return "Not measured yet."
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in report["rows"]:
        if row["provider"] == OURS:
            column = f"{row['op'].replace('_', ' ')}, {row['dtype']}"
            columns[column] = None
            for other in row["paired"]:
                if other != "plain":  # the best of the plain ways, which have lines of their own
                    found.setdefault(other, {})[column] = against(row, other)
    rows = [[way, *(values.get(c, "-") for c in columns)] for way, values in found.items()]
    return table(("against", *columns), rows) + "\n\n" + conditions(report)


def dropin_reports() -> list[dict[str, Any]]:
    """Blocks of diffusers; families may be measured one by one, into ``dropin*.json``."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("dropin*.json"))]


def dropin_rows() -> dict[tuple[str, ...], dict[str, Any]]:
    """(case, dtype, mode, provider) -> row, from all reports."""
    return {
        (r["case"], r["dtype"], r["mode"], r["provider"]): r
        for report in dropin_reports()
        for r in report["rows"]
    }


def dropin_conditions() -> str:
    return "\n\n".join(dict.fromkeys(conditions(report) for report in dropin_reports()))


def dropin() -> str:
    """One line per family: how much faster and smaller an accelerated block is."""
    found = dropin_rows()
    first: dict[str, str] = {}  # family -> the case of its first block
    for (case, *_, provider), row in found.items():
        if provider == OURS and not case.endswith(LORA):
            first.setdefault(row["op"], case)
    rows = []
    for case in first.values():
        ways = ((case, "fp32", "fwd"), (case, "bf16", "fwd"),
                (case + LORA, "fp32", "fwd+bwd"), (case, "fp32", "fwd+bwd"))  # fmt: skip
        rows.append([case, *(_faster(found, way) for way in ways), _smaller(found, ways[2])])
    if not rows:
        return "Not measured yet."
    header = ("block", "inference, fp32", "inference, bf16", "LoRA training, fp32",
              "full training, fp32", "memory of a LoRA step, MB")  # fmt: skip
    return table(header, rows) + "\n\n" + dropin_conditions()


LORA = ", LoRA"


def _faster(found: Mapping[Any, Mapping[str, Any]], way: tuple[str, str, str]) -> str:
    """Against upstream's block, and (in brackets) both of them compiled; below 1 we lose."""
    ours, compiled = found.get((*way, OURS)), found.get((*way, "patched_compile"))
    if ours is None:
        return "-"
    plain = ours.get("paired", {}).get("plain")
    theirs = found.get((*way, "compile"))
    both = "-"
    if compiled is not None and theirs is not None:
        both = f"{theirs['p50_ms'] / compiled['p50_ms']:.2f}"
    return f"{plain['median']:.2f} ({both})" if plain else f"- ({both})"


def _smaller(found: Mapping[Any, Mapping[str, Any]], way: tuple[str, str, str]) -> str:
    ours, plain = found.get((*way, OURS)), found.get((*way, "plain"))
    if ours is None or plain is None:
        return "-"
    return f"{ours['peak_mem_mb']:.0f} of {plain['peak_mem_mb']:.0f}"


def all_dropin() -> str:
    """Every block: milliseconds and megabytes of all four ways."""
    found = dropin_rows()
    providers = ("plain", "compile", OURS, "patched_compile")
    rows = []
    for (*key, provider), row in found.items():
        if provider == OURS:
            four = [found.get((*key, p)) for p in providers]
            rows.append(
                [
                    " ".join(key),
                    *("-" if r is None else f"{r['p50_ms']:.0f}" for r in four),
                    against(row, "plain"),
                    " / ".join("-" if r is None else f"{r['peak_mem_mb']:.0f}" for r in four),
                ]
            )
    if not rows:
        return "Not measured yet."
    header = (
        "block", "upstream, ms", "compiled", "accelerated", "accelerated + compiled",
        "accelerated is faster than upstream", "peak MB of the four",
    )  # fmt: skip
    refused = [
        f"- {item['case']}{', ' + item['provider'] if 'provider' in item else ''}: "
        f"{item.get('reason') or item['error']}"
        for report in dropin_reports()
        for item in (*report["env"]["skipped"], *report["env"]["errors"])
    ]
    notes = ["Not in the table, with the reason:\n\n" + "\n".join(refused)] if refused else []
    return "\n\n".join([table(header, rows), *notes, dropin_conditions()])


def sizes() -> str:
    """Large pictures and videos: time and memory of each stage."""
    report = load(RESULTS / "sizes.json")
    if report is None:
        return "Not measured yet."
    rows = [
        [f"{r['case']}, {r['stage']}", f"{r['tokens']}", f"{r['seconds']:.1f}", f"{r['peak_mb']}"]
        for r in report["rows"]
    ]
    env = report["env"]
    where = f"{env['cpu']}, {env['threads']} threads; {env['date'][:10]}"
    header = ("what", "latents or tokens", "seconds", "peak of the process, MB")
    return table(header, rows) + f"\n\n{where}; the bound is {report['bound_mb']} MB."


def judged(name: str, show: Callable[[Mapping[str, Any], Any], str]) -> str:
    """A table of the judge's results in ``model/results``."""
    report = load(ROOT / "model" / "results" / f"{name}.json")
    return "Not measured yet." if report is None else show(report, table)


TABLES: dict[str, Callable[[], str]] = {
    "ops": lambda: ratios("ops", headline),
    "all_ops": lambda: timings("ops"),
    "dispatch": dispatch,
    "block": lambda: ratios("block"),
    "all_block": lambda: timings("block"),
    "e2e": ways,
    "all_e2e": end_to_end,
    "sizes": sizes,
    "dropin": dropin,
    "all_dropin": all_dropin,
    "scores": lambda: judged("evaluate", headline_scores),
    "all_scores": lambda: judged("evaluate", scores),
    "certificate": lambda: judged("certificate", certificate),
    "expansion": lambda: judged("expansion", expansion),
    "study_packing": lambda: judged("study_packing", studies.packing),
    "study_native": lambda: judged("study_native", studies.native),
    "study_compute": lambda: judged("study_compute", studies.compute),
    "study_events": lambda: judged("study_events", studies.events),
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
