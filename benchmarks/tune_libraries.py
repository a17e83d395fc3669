"""Rules for attention libraries from a benchmark report: who is measured to be faster, where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from sora_kernels.bench.schema import OURS
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN

FASTER = 1.02  # how much faster than our kernel a library must be to be preferred

Times = dict[str, dict[str, float]]  # mode -> provider -> milliseconds


def _by_case(report: Mapping[str, Any]) -> dict[str, Times]:
    found: dict[str, Times] = defaultdict(lambda: defaultdict(dict))
    for row in report["rows"]:
        if row["op"] == "packed_attention" and not row["case"].startswith("window"):
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


def library_rules(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rules as `packed_attention.libraries` reads them, longest segments first.

    A rule holds from the length of its case up to that of the next one, for its head dim, with or
    without a gradient, and for segments of equal or of unequal length. Neighbours that prefer the
    same are one rule, and lengths below the shortest measured stay with our kernel.
    """
    from .bench_packed_attention import CPU, CUDA

    shapes = {shape.case: shape for shape in (*CUDA, *CPU)}
    groups: dict[tuple[int, bool, bool], dict[int, list[str]]] = defaultdict(dict)
    for case, times in _by_case(report).items():
        if case not in shapes:
            continue
        shape = shapes[case]
        equal = len(set(shape.lengths)) == 1
        for training in (False, True):
            order = _order(times, training)
            if order:
                groups[shape.width, training, equal].setdefault(max(shape.lengths), order)
    rules = []
    for (width, training, equal), by_length in sorted(groups.items()):
        kept: list[dict[str, Any]] = []
        for length in sorted(by_length):
            if kept and kept[-1]["prefer"] == by_length[length]:
                continue
            kept.append(
                {
                    "min_seqlen": length, "head_dim": width, "training": training,
                    "equal": equal, "prefer": by_length[length],
                }
            )  # fmt: skip
        rules += reversed(kept)
    return [rule for rule in rules if rule["prefer"] != [OWN] or _shadows(rule, rules)]


def _shadows(rule: Mapping[str, Any], rules: list[dict[str, Any]]) -> bool:
    """Whether a rule for our kernel stands before one of shorter segments that prefers others."""
    same = ("head_dim", "training", "equal")
    return any(
        all(other[name] == rule[name] for name in same)
        and other["min_seqlen"] < rule["min_seqlen"]
        and other["prefer"] != [OWN]
        for other in rules
    )
