"""Repairs Triton's interpreter where a newer NumPy broke it. Imported by kernels with run-time loops."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_original = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 turns loop bounds into ints by `int(array of one element)`, an error in NumPy 2.4."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def repair() -> None:
    """Makes `range(a, b)` over loaded values work in the interpreter. Idempotent."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
