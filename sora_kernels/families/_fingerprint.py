"""Fingerprints of upstream source: an adapter restates code that it must recognise first.

The fingerprint of a function is a hash of its syntax tree without docstrings, annotations and
positions: reformatting and comments do not change it, any change of what is computed does. Empty
fields are skipped, so that it is the same on every Python version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

_SKIPPED = {"ctx", "kind", "type_comment", "annotation", "returns", "type_params"}


def resolve(path: str) -> Any:
    """The object that a dotted path names; modules are imported as needed.

    Raises:
        ImportError, AttributeError: there is no such thing.
    """
    parts = path.split(".")
    module = importlib.import_module(parts[0])
    found: Any = module
    name = parts[0]
    for part in parts[1:]:
        name = f"{name}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(name)
        found = getattr(found, part)
    return found


@functools.cache
def fingerprint(path: str) -> str:
    """16 hex digits of the function that ``path`` names, or ``"missing"``."""
    try:
        source = inspect.getsource(inspect.unwrap(resolve(path)))
        tree = ast.parse(textwrap.dedent(source))
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return "missing"
    return hashlib.sha256(_text(tree).encode()).hexdigest()[:16]


def unknown_source(known: Mapping[str, str]) -> str | None:
    """Why the installed upstream is not the one that was restated, or None if it is."""
    for path, expected in known.items():
        found = fingerprint(path)
        if found not in expected.split():
            return f"source of {path} is unknown ({found})"
    return None


def _text(node: Any) -> str:
    if isinstance(node, list):
        return "[" + ",".join(_text(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        node = ast.Assign([node.target], node.value or ast.Constant(None))
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _SKIPPED or value is None or value == []:
            continue
        if name == "body" and isinstance(value, list) and _is_docstring(value[0]):
            value = value[1:]
        fields.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
