"""The faster search of the interpreter for builtins replaces what the slow one replaces."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import remember_builtins


def test_the_same_names_are_replaced_in_the_same_order() -> None:
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
