"""Rules for attention libraries from a benchmark report: who is measured to be faster, where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from sora_kernels.bench.schema import OURS
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN

FASTER = 1.02  # how much faster than our kernel a library must be to be preferred

Kind = tuple[tuple[str, bool], ...]  # what a rule says of its calls besides length and head dim
Times = dict[str, dict[str, float]]  # mode -> provider -> milliseconds


def _by_case(report: Mapping[str, Any]) -> dict[str, Times]:
    found: dict[str, Times] = defaultdict(lambda: defaultdict(dict))
    for row in report["rows"]:
        if row["op"] == "packed_attention":
            provider = OWN if row["provider"] == OURS else row["provider"]
            if provider == OWN or provider in LIBRARIES:
                found[row["case"]][row["mode"]][provider] = row["p50_ms"]
    return found


def _order(times: Times, training: bool) -> list[str]:
    """Providers measured in all modes that count, fastest first, up to our own."""
    modes = ("fwd", "bwd") if training else ("fwd",)
    totals = {
        name: sum(times[mode][name] for mode in modes)
        for name in times.get("fwd", {})
        if all(name in times.get(mode, {}) for mode in modes)
    }
    if OWN not in totals:
        return []
    faster = [n for n, ms in totals.items() if n != OWN and ms * FASTER < totals[OWN]]
    return [*sorted(faster, key=lambda n: totals[n]), OWN]


def _shapes() -> dict[str, tuple[int, int, Kind]]:
    """Head dim, longest segment and kind of every case that a rule can be made from."""
    from . import bench_packed_attention as dense
    from . import bench_windowed_attention as windowed

    found: dict[str, tuple[int, int, Kind]] = {
        shape.case: (shape.width, max(shape.lengths), (("equal", len(set(shape.lengths)) == 1),))
        for shape in (*dense.CUDA, *dense.CPU)
    }
    for shape in (*windowed.CUDA, *windowed.CPU):
        found[shape.case] = shape.width, max(shape.lengths), (("windowed", True),)
    return found


def library_rules(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rules as `packed_attention.libraries` reads them, longest segments first.

    A rule holds from the length of its case up to that of the next one, for its head dim, with or
    without a gradient, and for segments of equal or of unequal length or for calls under a window.
    Of several cases of one length the first counts. Neighbours that prefer the same are one rule,
    and lengths below the shortest measured stay with our kernel.
    """
    shapes = _shapes()
    groups: dict[tuple[int, bool, Kind], dict[int, list[str]]] = defaultdict(dict)
    for case, times in _by_case(report).items():
        if case not in shapes:
            continue
        width, longest, kind = shapes[case]
        for training in (False, True):
            order = _order(times, training)
            if order:
                groups[width, training, kind].setdefault(longest, order)
    rules = []
    for (width, training, kind), by_length in sorted(groups.items()):
        kept: list[dict[str, Any]] = []
        for length in sorted(by_length):
            if kept and kept[-1]["prefer"] == by_length[length]:
                continue
            kept.append(
                {
                    "min_seqlen": length, "head_dim": width, "training": training, **dict(kind),
                    "prefer": by_length[length],
                }
            )  # fmt: skip
        rules += reversed(kept)
    return [rule for rule in rules if rule["prefer"] != [OWN] or _shadows(rule, rules)]


def _shadows(rule: Mapping[str, Any], rules: list[dict[str, Any]]) -> bool:
    """Whether a rule for our kernel stands before one of shorter segments that prefers others."""
    same = ("head_dim", "training", "equal", "windowed")
    return any(
        all(other.get(name) == rule.get(name) for name in same)
        and other["min_seqlen"] < rule["min_seqlen"]
        and other["prefer"] != [OWN]
        for other in rules
    )
