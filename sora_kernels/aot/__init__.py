"""Cross-compile every kernel without a GPU and check what the compiler made of it.

`python -m sora_kernels.aot --arch 80 90 100 120 --json F` compiles the production configurations
that each op lists in `aot_cases()` and fails (exit code 1) when a kernel

- spills registers, as `ptxas -v` counts it (a stack frame alone is a false alarm),
- wants more shared memory than a block may have on that chip,
- is bound by memory bandwidth and has no 16-byte loads or no 16-byte stores,
- is a matrix kernel without one tensor-core instruction per `tl.dot`, or with wgmma serialised,
- loads by tensor descriptors without one TMA instruction per load,
- stores nothing at all (Triton emits a body that is one `trap` when it gives up, and reports
  success).

Compiler output is cached by source hash in `$SORA_KERNELS_CACHE_DIR` (default
`~/.cache/sora_kernels`); the checks themselves always run anew.
"""

from .case import ARCHS, AotCase

__all__ = ["ARCHS", "AotCase"]
