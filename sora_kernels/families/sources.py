"""``python -m sora_kernels.families.sources``: fingerprints of the installed upstream.

Prints one line per function that an adapter restates, marked where the table does not know it, and
exits with 1 if there is such a line. Paths given as arguments are printed instead.
"""

from __future__ import annotations

import sys

from ._data import BLOCKS
from ._fingerprint import fingerprint


def known_sources() -> dict[str, str]:
    """Every restated upstream function and its known fingerprints, separated by blanks."""
    found: dict[str, str] = {}
    for block in BLOCKS:
        for sources in (block.sources, *(p.sources for p in block.processors)):
            found.update(sources)
    return found


def main(paths: list[str]) -> int:
    if paths:
        for path in paths:
            print(f"{fingerprint(path)}  {path}")
        return 0
    unknown = 0
    for path, expected in known_sources().items():
        found = fingerprint(path)
        mark = " " if found in expected.split() else "!"
        unknown += mark == "!"
        print(f"{mark} {found}  {path}")
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
