"""What :func:`sora_kernels.accelerate` found and did."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One site, or something that is left alone as a whole.

    Attributes:
        module: name of the block inside the model.
        family: of models, such as ``"Wan"``.
        site: name of the site inside the block; empty for a block left alone as a whole.
        op: the op that runs there.
        law: its rounding law: ``"fp32_once"`` or the points, joined by ``+``.
        reason: why it is left alone; None if it is fused.
    """

    module: str
    family: str
    site: str = ""
    op: str = ""
    law: str = ""
    reason: str | None = None


@dataclass
class Report:
    """Every site that was found, and what became of it. ``str(report)`` is for reading.

    Attributes:
        model: class of the model.
        entries: one per site, in the order of the model.
        dry_run: True if nothing was changed.
        law: the law asked for instead of the models' own, or None.
    """

    model: str
    entries: list[Entry] = field(default_factory=list)
    dry_run: bool = False
    law: str | None = None

    @property
    def fused(self) -> list[Entry]:
        """Sites that run one of our ops now (with ``dry_run``: that would)."""
        return [e for e in self.entries if e.reason is None]

    @property
    def left(self) -> list[Entry]:
        """Sites and blocks left alone; ``reason`` says why."""
        return [e for e in self.entries if e.reason is not None]

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(e.family for e in self.entries if e.family))

    def counts(self) -> Counter[str]:
        """Fused sites by op."""
        return Counter(e.op for e in self.fused)

    def __str__(self) -> str:
        if not self.entries:
            return f"{self.model}: nothing to accelerate (no block of a known family); unchanged"
        sites = sum(1 for e in self.entries if e.site)
        done = "would be fused" if self.dry_run else "fused"
        families = ", ".join(self.families)
        lines = [f"{self.model} ({families}): {len(self.fused)} of {sites} sites {done}"]
        if self.law is not None:
            lines.append(f"  rounding law: {self.law} everywhere, not the model's own")
        groups: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            key = (e.site or "whole block", e.op, e.law, e.reason or "")
            groups.setdefault(key, []).append(e.module)
        for title, wanted in (("fused", True), ("left alone", False)):
            chosen = {k: v for k, v in groups.items() if (not k[3]) == wanted}
            if not chosen:
                continue
            lines.append(f"  {title}:")
            for (site, op, law, reason), modules in chosen.items():
                what = f"{op}, law {law}" if wanted else reason
                lines.append(f"    {len(modules):3} x {_where(modules)}.{site}: {what}")
        return "\n".join(lines)


def _where(modules: list[str]) -> str:
    """``blocks.*`` for blocks that differ by a number; the names themselves if they are few."""
    shapes = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in modules))
    return "|".join(shapes) if len(modules) > 1 else modules[0]
