"""The faster search of the interpreter for builtins replaces what the slow one replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import triton.language as tl
from triton.runtime import interpreter
from tests.interpreter import remember_builtins

remember_builtins()
searches = (interpreter._patch_builtin.original, interpreter._patch_builtin)
for pkg in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
    found = []
    for search in (*searches, searches[1]):
        outer, inner = interpreter._LangPatchScope(), interpreter._LangPatchScope()
        search(pkg, interpreter.interpreter_builder, outer)
        search(pkg, interpreter.interpreter_builder, inner)  # as in a nested call
        found.append([[(o, name) for o, name, _ in s._changes] for s in (outer, inner)])
        inner.restore()
        outer.restore()
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) > 5 or pkg is tl.core.tensor_descriptor_base
    assert not found[0][1]
"""


def test_the_same_names_are_replaced_in_the_same_order() -> None:
    """In a process of its own: a kernel that raised elsewhere may have left names replaced."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
