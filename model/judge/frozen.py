"""What the judge is, as two hashes per version, so that no number is read by a changed judge.

``frozen.json`` holds one entry per version. "source" is a hash over the syntax trees of the
oracle, the world and the grammar (comments, docstrings and formatting do not count); "behaviour"
is a hash over captions, pixels and readings of a fixed set of clips, rounded so that the last
bits of a machine do not count. `python -m model.judge freeze` adds the entry of a new version and
never changes an old one.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from model import grammar, oracle, world
from model.checkpoint import read_json, write_json
from model.config import WorldConfig
from model.oracle import ORACLE_VERSION, Reading, read
from model.world import KINDS, captions, render, sample_scene

FROZEN = Path(__file__).with_name("frozen.json")
PROBES_PER_KIND = 3
_CONFIG = WorldConfig(
    kinds=(("one", 1.0),),
    sizes=(((32, 32), 1.0), ((32, 48), 1.0), ((48, 32), 1.0)),
    backgrounds=(("black", 1.0), ("gray", 1.0), ("white", 1.0), ("brown", 1.0)),
)


def source_hash() -> str:
    """sha256 over the code of the three modules."""
    digest = hashlib.sha256()
    for module in (oracle, world, grammar):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        digest.update(_spell(tree).encode())
    return digest.hexdigest()


def _spell(node: Any) -> str:
    """A syntax tree as text that is the same in every version of Python.

    Docstrings, the version itself and f-strings (messages, whose trees differ) are left out, and
    so are empty fields, which newer versions add.
    """
    if isinstance(node, list):
        return "[" + ",".join(_spell(item) for item in node) + "]"
    if isinstance(node, ast.JoinedStr):
        return "fstring"
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORACLE_VERSION":
        return ""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return ""
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [
        f"{name}={_spell(value)}"
        for name, value in ast.iter_fields(node)
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment")
    ]
    return f"{type(node).__name__}({','.join(parts)})"


def behaviour_hash() -> str:
    """sha256 over what the judge makes of PROBES_PER_KIND clips of every kind."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for number in range(PROBES_PER_KIND):
            rng = np.random.default_rng([20, KINDS.index(kind), number])
            frames = {"image": 1, "exit": 17}.get(kind, 9)
            scene = sample_scene(rng, _CONFIG, kind=kind, frames=frames)
            video = render(scene)
            mean = round(float(video.mean()), 3)
            seen = [*captions(scene), mean, described(read(video))]
            digest.update(json.dumps(seen).encode())
    return digest.hexdigest()


def described(reading: Reading) -> list[Any]:
    """A reading as plain JSON types, numbers rounded to a tenth of a pixel."""

    def rounded(points: Any) -> list[Any]:
        return [None if p is None else [round(v, 1) + 0.0 for v in p] for p in points]

    return [
        reading.background,
        reading.camera is not None,
        [
            [
                item.colour, item.shape, item.size, item.direction, item.speed, item.straight,
                rounded(item.positions), rounded(item.velocities),
            ]
            for item in reading.objects
        ],
    ]  # fmt: skip


def current() -> dict[str, str]:
    """The hashes of the judge as it is in the working tree."""
    return {"source": source_hash(), "behaviour": behaviour_hash()}


def stamp() -> dict[str, str]:
    """What a result file says about the judge that made it."""
    return {"oracle": ORACLE_VERSION, "source": source_hash()[:16]}


def check(path: Path = FROZEN) -> None:
    """Raises ValueError unless the judge is the one that was frozen under its version."""
    entries = read_json(path)
    if ORACLE_VERSION not in entries:
        raise ValueError(
            f"ORACLE_VERSION: expected one of {sorted(entries)}, got {ORACLE_VERSION!r}; "
            "`python -m model.judge freeze` adds it"
        )
    frozen, now = entries[ORACLE_VERSION], current()
    changed = [name for name in now if frozen[name] != now[name]]
    if changed:
        raise ValueError(
            f"ORACLE_VERSION: expected the judge frozen as {ORACLE_VERSION!r}, got another "
            f"{' and '.join(changed)}; a changed judge needs a new version"
        )


def freeze(date: str, path: Path = FROZEN) -> dict[str, str]:
    """Adds the entry of ORACLE_VERSION; raises ValueError if it is there with other hashes."""
    entries = read_json(path) if path.exists() else {}
    if ORACLE_VERSION in entries:
        check(path)
        return entries[ORACLE_VERSION]
    entries[ORACLE_VERSION] = {"date": date, **current()}
    write_json(path, entries)
    return entries[ORACLE_VERSION]
