"""Test setup that must happen before any Triton kernel is decorated."""

from __future__ import annotations

import os

# CPU tests run Triton kernels in the interpreter, which is chosen when a kernel is decorated. The
# cross-compilation tests (tests/aot) and GPU tests need it off and run in a process of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")
