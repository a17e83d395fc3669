"""Did it get slower? Two reports, compared through ratios taken inside each of them.

Times of two runs differ because the machine did. So what is compared is how many times faster than
a *control* provider (plain PyTorch, which both reports timed round by round beside ours) our
provider was: both of these ratios are paired, drift cancels in each, and their quotient is the
slowdown. A change fails only when even the favourable end of its interval is over the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .env import machine
from .schema import KEY, OURS, row_key
from .timing import median_interval

CONTROLS = ("plain", "compile")


@dataclass(frozen=True)
class Change:
    """How much slower HEAD is than BASE in one row: 1.10 means ten percent slower."""

    key: tuple[str, ...]
    slowdown: float
    low: float
    high: float
    basis: str  # "paired with <control>", or "absolute" (same machine, no control in common)

    @property
    def name(self) -> str:
        suite, op, mode, case, dtype, provider = self.key
        label = f"{suite}/{op}/{mode}/{case}/{dtype}"
        return label if provider == OURS else f"{label}/{provider}"

    def regressed(self, fail_over_percent: float) -> bool:
        return self.low > 1 + fail_over_percent / 100


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_base: list[tuple[str, ...]]
    only_head: list[tuple[str, ...]]
    not_comparable: list[tuple[str, ...]]


def _paired(
    base: Mapping[str, Any], head: Mapping[str, Any]
) -> tuple[str, float, float, float] | None:
    for control in CONTROLS:
        b = base.get("paired", {}).get(control)
        h = head.get("paired", {}).get(control)
        if b and h:
            return (
                f"paired with {control}",
                b["median"] / h["median"],
                b["low"] / h["high"],
                b["high"] / h["low"],
            )
    return None


def _absolute(
    base: Mapping[str, Any], head: Mapping[str, Any]
) -> tuple[str, float, float, float] | None:
    if not base.get("samples_ms") or not head.get("samples_ms"):
        return None
    b, h = median_interval(base["samples_ms"]), median_interval(head["samples_ms"])
    return "absolute", h.median / b.median, h.low / b.high, h.high / b.low


def compare(base: Mapping[str, Any], head: Mapping[str, Any]) -> Comparison:
    """Compares our rows of two validated reports.

    Rows are paired by (suite, op, mode, case, dtype, provider). A row without a control in both
    reports falls back to its absolute samples, if both come from the same machine with the same
    number of threads; otherwise it is listed as not comparable.

    Raises:
        ValueError: the reports have no row of ours in common.
    """
    old = {row_key(row): row for row in base["rows"] if row["provider"] == OURS}
    new = {row_key(row): row for row in head["rows"] if row["provider"] == OURS}
    shared = [key for key in new if key in old]
    if not shared:
        raise ValueError(
            f"the reports have no {OURS} row in common: rows are paired by {', '.join(KEY)}"
        )
    same_machine = machine(base["env"]) == machine(head["env"])
    changes, not_comparable = [], []
    for key in shared:
        found = _paired(old[key], new[key])
        if found is None and same_machine:
            found = _absolute(old[key], new[key])
        if found is None:
            not_comparable.append(key)
        else:
            basis, slowdown, low, high = found
            changes.append(Change(key, slowdown, low, high, basis))
    return Comparison(
        changes=changes,
        only_base=[key for key in old if key not in new],
        only_head=[key for key in new if key not in old],
        not_comparable=not_comparable,
    )
