"""A page of all committed results: `python -m benchmarks.report -o DIR`.

Writes `index.html`, which needs nothing but itself, and the same pictures as PNG files beside it.
Everything on it comes from the JSON files under `benchmarks/results/<gpu or cpu>/`; what is missing
there is said in a sentence.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_kernels.bench import read_report
from sora_kernels.bench.plot import COLOURS, OTHER_COLOURS, caption, save
from sora_kernels.bench.schema import OURS, write_text

from . import model
from .windows import plot as plot_windows

RESULTS = Path(__file__).parent / "results"
OTHERS = ("plain", "compile")
SUITES = ("ops", "block", "e2e", "dropin")
"""What `benchmarks/gpu_lane.sh` measures on a GPU."""
BESIDE = ("lane", "info", "ceilings", "tune_attention")
"""Files of the lane that are no reports."""
LESS_WORK = ("copy", "bare")
"""Providers that are floors."""
NO_LIBRARY = (*LESS_WORK, "compile", "patched_compile", "padded", "per_tile", "cuda", "pointers")
"""Providers that are floors, or other forms of plain PyTorch or of ours."""
PEER = "peer"
RIVALS = {
    "plain": ("plain PyTorch", COLOURS["plain"]),
    "compile": ("torch.compile", COLOURS["compile"]),
    PEER: ("the fastest other library", OTHER_COLOURS[1]),
}
MARKERS = {"fwd": "o", "bwd": "^", "fwd+bwd": "s"}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)  # where all lies within 4 times
Report = Mapping[str, Any]
Row = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.note { color: #777; font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; }
.lost { color: #cf222e; }
"""


def ours_of(report: Report) -> list[Row]:
    """Our rows that are a kernel's or a model's; dispatch and the planner have no floor."""
    skip = ("dispatch", "planner")
    return [r for r in report["rows"] if r["provider"] == OURS and r["op"] not in skip]


def label(row: Row) -> str:
    """Op and case, unless the case begins with the op: "DiT-XL/2 256 ..." of DiT."""
    op = "" if row["case"].startswith(row["op"]) else f"{row['op']} "
    return f"{op}{row['case']} {row['dtype']} {row['mode']}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    return figure, axes


def peers_of(row: Row) -> dict[str, Any]:
    """Paired ratios against libraries."""
    paired = row.get("paired", {}).items()
    return {n: r for n, r in paired if n not in NO_LIBRARY and not n.startswith("plain")}


def rivals_of(row: Row) -> dict[str, Any]:
    """The ratios that are drawn: against plain PyTorch, torch.compile, and the fastest library."""
    paired = row.get("paired", {})
    found = {other: paired[other] for other in OTHERS if other in paired}
    if peers := peers_of(row):
        found[PEER] = min(peers.values(), key=lambda ratio: ratio["median"])
    return found


def speedups(report: Report, path: Path) -> Path | None:
    """Paired ratios with their intervals, one line per case and rival, on a logarithmic axis."""
    rows = [r for r in ours_of(report) if rivals_of(r)]
    if not rows:
        return None
    others = [other for other in RIVALS if any(other in rivals_of(row) for row in rows)]
    height = 0.8 / max(2.6, len(others))
    figure, axes = _figure(9, 1.1 + (0.2 + 0.03 * len(others)) * len(rows))
    for position, row in enumerate(rows):
        for turn, other in enumerate(others):
            ratio = rivals_of(row).get(other)
            if ratio is None:
                continue
            colour = RIVALS[other][1]
            at = position + (turn - (len(others) - 1) / 2) * 1.07 * height
            axes.barh(at, ratio["median"] - 1, left=1, height=height, color=colour)
            axes.plot([ratio["low"], ratio["high"]], [at, at], color="#24292f", linewidth=0.9)
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in (FINE if high < 4 * low else TICKS) if low <= t <= high])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1, color="#57606a", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("times as fast, with the 95% interval of the paired ratio", fontsize=8)
    handles = [axes.barh(0, 0, color=RIVALS[other][1]) for other in others]
    names = [f"than {RIVALS[other][0]}" for other in others]
    axes.legend(
        handles, names, fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="lower right", ncols=3
    )
    return save(figure, path)


def roofline(report: Report, path: Path) -> Path | None:
    """Arithmetic rate over arithmetic intensity, under the two measured ceilings."""
    rows = [r for r in ours_of(report) if r["flops"] > 0 and r["bytes"] > 0]
    if not rows:
        return None
    ceilings = report["ceilings"]
    by_dtype = ceilings.get("matmul_tflops_by_dtype") or {"fp32": ceilings["matmul_tflops"]}
    unit, scale = ("TFLOP/s", 1.0) if max(by_dtype.values()) >= 1 else ("GFLOP/s", 1e3)
    figure, axes = _figure(7.5, 5)
    intensity = [r["flops"] / r["bytes"] for r in rows]
    corners = {dtype: 1e3 * peak / ceilings["copy_gbps"] for dtype, peak in by_dtype.items()}
    ends = min(*intensity, *corners.values()) / 3, max(*intensity, *corners.values()) * 3
    styles = {"fp32": "-", "bf16": "--", "fp16": ":"}
    for dtype, peak in by_dtype.items():
        points = (ends[0], corners[dtype], ends[1])
        rates = [scale * min(peak, x * ceilings["copy_gbps"] / 1e3) for x in points]
        name = f"copy and matrix rate, {dtype}"
        axes.loglog(points, rates, styles[dtype], color="#57606a", linewidth=0.9, label=name)
    palette = (*OTHER_COLOURS, *COLOURS.values(), "#bc4c00", "#4c2889", "#116329")
    for index, op in enumerate(dict.fromkeys(r["op"] for r in rows)):
        colour = palette[index % len(palette)]
        axes.plot([], [], "o", color=colour, markersize=4.5, label=op)
        for row in (r for r in rows if r["op"] == op):
            axes.loglog(
                row["flops"] / row["bytes"], scale * row["tflops"], MARKERS[row["mode"]],
                color=colour, markersize=4.5,
                markerfacecolor=colour if row["dtype"] == "fp32" else "none",
            )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    if ends_within(axes.get_ylim()):
        axes.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:g}"[0] in "235" else ""
        )
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel(
        "FLOP per byte of the least traffic (circle forward, triangle backward, square both; "
        "hollow: 16 bits)", fontsize=8,
    )  # fmt: skip
    axes.set_ylabel(unit, fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6.5, frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    return save(figure, path)


def ends_within(limits: tuple[float, float]) -> bool:
    """Whether powers of ten alone would label such an axis too sparsely."""
    return limits[1] < 50 * limits[0]


def memory(report: Report, path: Path) -> Path | None:
    """Peak memory of one call as a share of plain PyTorch's."""
    plain = {_case(r): r["peak_mem_mb"] for r in report["rows"] if r["provider"] == "plain"}
    rows = [r for r in ours_of(report) if plain.get(_case(r), 0) > 0]
    if not rows:
        return None
    figure, axes = _figure(9, 1.1 + 0.2 * len(rows))
    for position, row in enumerate(rows):
        share = 100 * row["peak_mem_mb"] / plain[_case(row)]
        axes.barh(position, share, height=0.7, color=COLOURS[OURS])
        text = f" {share:.0f}% of {plain[_case(row)]:,.0f} MB "
        inside = share > 45  # beside the line at 100, not across it
        axes.text(
            share, position, text, va="center", fontsize=6,
            ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    axes.axvline(100, color="#57606a", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel("peak memory of a call, percent of plain PyTorch's", fontsize=8)
    return save(figure, path)


def _case(row: Row) -> tuple[str, ...]:
    return row["suite"], row["op"], row["mode"], row["case"], row["dtype"]


def _against(row: Row, other: str) -> str:
    ratio = row.get("paired", {}).get(other)
    if ratio is None:
        return "<td>-</td>"
    lost = ' class="lost"' if ratio["high"] < 1 else ""
    return f"<td{lost}>{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]</td>"


def _against_others(row: Row) -> str:
    """Every further provider by name."""
    others = [name for name in row.get("paired", {}) if name not in (*OTHERS, *LESS_WORK)]
    cells = [f"<th>{html.escape(name)}</th>{_against(row, name)}" for name in others]
    return f"<td><table><tr>{'</tr><tr>'.join(cells)}</tr></table></td>" if cells else "<td>-</td>"


def rows_table(report: Report) -> str:
    """Every row of ours; red where a rival is faster beyond doubt."""
    more = any(set(row.get("paired", {})) - {*OTHERS, *LESS_WORK} for row in ours_of(report))
    lines = [
        "<tr><th>case</th><th>ms</th><th>of floor</th><th>GB/s</th><th>peak MB</th>"
        "<th>faster than plain</th><th>than compile</th>"
        + ("<th>than</th>" if more else "")
        + "</tr>"
    ]
    for row in ours_of(report):
        lines.append(
            f"<tr><td>{html.escape(label(row))}</td><td>{row['p50_ms']:.2f}</td>"
            f"<td>{100 * row['roofline']:.0f}%</td><td>{row['gbps']:.1f}</td>"
            f"<td>{row['peak_mem_mb']:.1f}</td>{_against(row, 'plain')}{_against(row, 'compile')}"
            + (_against_others(row) if more else "")
            + "</tr>"
        )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _predicted(report: Report, path: Path) -> Path | None:
    rows = model.against_measured(report)
    return model.plot(rows, path, caption(report)) if rows else None


def _scaling(report: Report, path: Path) -> Path | None:
    return plot_windows(report, path)


PICTURES = {
    "speedup": ("Speed against plain PyTorch and torch.compile", speedups),
    "roofline": ("Roofline", roofline),
    "memory": ("Memory", memory),
    "predicted": ("Predicted against measured", _predicted),
}
WITHOUT = {
    "speedup": "no row was timed beside plain PyTorch or torch.compile",
    "roofline": "no row does arithmetic",
    "memory": "no row has the memory of plain PyTorch beside ours",
    "predicted": "the static model knows no kernel of these rows",
    "scaling": "no row",
}


def heading(place: str, name: str) -> str:
    return (
        f'<h2 id="{html.escape(place)}-{html.escape(name)}">{html.escape(f"{place}: {name}")}</h2>'
    )


def section(place: str, name: str, report: Report, out: Path) -> str:
    """One result file: its pictures, written to `out`, and its table."""
    pictures = {"scaling": ("Time over tokens", _scaling)} if name == "windows" else PICTURES
    parts = [heading(place, name)]
    parts.append(f'<p class="note">{html.escape(caption(report))}</p>')
    for kind, (title, draw) in pictures.items():
        if kind == "predicted" and name != "ops":
            continue
        path, reason = None, WITHOUT[kind]
        try:
            path = draw(report, out / f"{place}-{name}-{kind}.png")
        except ValueError as error:  # a GPU, or a kernel, that the static model does not know
            reason = str(error)
        if path is None:
            text = html.escape(f"{title}: nothing to draw, {reason}.")
            parts.append(f'<p class="note">{text}</p>')
        else:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{data}">')
    if name != "windows":
        parts.append(f"<details><summary>All rows</summary>{rows_table(report)}</details>")
    return "\n".join(parts)


def sizes_section(place: str, found: Report) -> str:
    """The runs of `benchmarks.sizes`: large pictures and videos through the stack, once each."""
    env = found["env"]
    note = f"{env['cpu']}, {env['threads']} threads · torch {env['torch']} · {env['date'][:10]}"
    names = ("case", "stage", "tokens", "seconds", "peak_mb")
    head = "".join(f"<th>{name.replace('_mb', ', MB')}</th>" for name in names)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(str(row[name]))}</td>" for name in names) + "</tr>"
        for row in found["rows"]
    ]
    return (
        f'{heading(place, "sizes")}<p class="note">{html.escape(note)}</p>'
        f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    )


def missing(places: Mapping[str, Sequence[str]]) -> str:
    """What no GPU has measured yet, in a sentence each."""
    lane = "<code>benchmarks/gpu_lane.sh --out DIR</code> measures"
    gpus = {place: names for place, names in places.items() if place != "cpu"}
    if not gpus:
        return (
            '<h2 id="gpu">GPU: not measured</h2><p>No result of a GPU is committed: '
            f"{', '.join(SUITES)} are missing, and with them the static model's prediction against "
            f"a measurement. {lane} them on a machine that has one; its reports belong in "
            "<code>benchmarks/results/NAME/</code>.</p>"
        )
    absent = {
        p: [s for s in SUITES if not any(n.startswith(s) for n in ns)] for p, ns in gpus.items()
    }
    return "".join(
        f"<p>Not measured on {html.escape(place)} yet: {', '.join(names)}. {lane} them.</p>"
        for place, names in absent.items()
        if names
    )


def order(path: Path) -> tuple[Any, ...]:
    """The CPU first, then by name; within a place the suites as they build on each other."""
    place, name = path.parent.name, path.stem
    rank = next((i for i, suite in enumerate(SUITES) if name.startswith(suite)), len(SUITES))
    return place != "cpu", place, rank, name


def build(results: Path, out: Path) -> Path:
    """The page from every `<place>/<suite>.json` under `results`; ValueError if there is none."""
    files = [p for p in sorted(results.glob("*/*.json"), key=order) if p.stem not in BESIDE]
    if not files:
        raise ValueError(f"--results: expected <gpu>/<suite>.json files under {results}")
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    places: dict[str, list[str]] = {}
    for path in files:
        place = path.parent.name
        places.setdefault(place, []).append(path.stem)
        if path.stem == "sizes":  # runs, not comparisons
            sections.append(sizes_section(place, json.loads(path.read_text())))
        else:
            sections.append(section(place, path.stem, read_report(path), out))
    sections.append(missing(places))
    links = [
        f'<a href="#{html.escape(place)}-{html.escape(name)}">{html.escape(f"{place}: {name}")}</a>'
        for place, names in places.items()
        for name in names
    ]
    gpus = [name for name in places if name != "cpu"]
    note = f"Measured on: {', '.join(['CPU'] * ('cpu' in places) + gpus)}."
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sora_kernels: results</title><style>{STYLE}</style>"
        f"<h1>sora_kernels: results</h1><p>{note} Ratios are medians over rounds in which all "
        "providers ran in turn, with 95% intervals; red marks a rival that is faster beyond doubt. "
        "The floor is the least traffic over the copy rate, or the arithmetic over the matrix "
        "rate, both measured in the same run; a kernel with streaming stores can beat the copy "
        f"rate, as a copy may read its target first.</p><nav>{' · '.join(links)}</nav>"
        + "\n".join(sections) + "</html>\n"
    )  # fmt: skip
    index = out / "index.html"
    write_text(index, page)
    return index


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    try:
        print(build(options.results, options.out))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
