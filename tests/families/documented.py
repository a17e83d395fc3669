"""What `docs/families.md` says, read from its table."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


def documented() -> dict[str, dict[str, str]]:
    """The rows of the table in ``docs/families.md``, by family."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    head = cells[0]
    return {row[0]: dict(zip(head, row, strict=True)) for row in cells[2:] if len(row) == len(head)}


def documented_counts(family: str) -> Counter[str]:
    """Fused sites of one block: op -> how many."""
    found = re.findall(r"(\d+) `(\w+)`", documented()[family]["fused per block"])
    return Counter({op: int(number) for number, op in found})


def documented_points(family: str) -> set[str]:
    """The points at which upstream rounds, of all sites; ``as X`` is that of another row."""
    rows = documented()

    def parts(name: str) -> list[set[str]]:
        modulation, _, qk = rows[name]["law"].partition("; q and k")
        found = [set(re.findall(r"`(\w+)`", text)) for text in (modulation, qk)]
        same = [r for r in rows if modulation.startswith(f"as {r}")]
        if same:
            other = parts(max(same, key=len))
            found = [found[0] | other[0], found[1] if qk else other[1]]
        return found

    return set.union(*parts(family))
