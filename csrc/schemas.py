"""Writes common/schemas.h from the schemas that the ops register, which are their one source.

    python csrc/schemas.py

Run it after a schema was changed, then build. A test compares the file with what it would write.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "common" / "schemas.h"

_HEAD = """\
// Schemas of the raw ops that C++ implements, made by csrc/schemas.py from what the ops register.
#pragma once

namespace sora {

struct Schemas {
  const char *name, *forward, *backward;
};

namespace schemas {
"""
_TAIL = """
}  // namespace schemas
}  // namespace sora
"""


def header(schemas: dict[str, tuple[str, str]]) -> str:
    """The text of the header, for ``backend.native_schemas()``."""
    text = _HEAD
    for op, directions in sorted(schemas.items()):
        literals = [json.dumps(op)]
        for schema in directions:
            *lines, last = textwrap.wrap(" ".join(schema.split()), 90)
            pieces = [line + " " for line in lines] + [last]
            literals.append("\n    ".join(json.dumps(piece) for piece in pieces))
        text += f"\nconstexpr Schemas {op}{{\n    " + ",\n    ".join(literals) + "};\n"
    return text + _TAIL


def main() -> None:
    sys.path.insert(0, str(ROOT))
    # Not with the compiled library: it may be older than the ops.
    with mock.patch.object(torch.ops, "load_library", side_effect=OSError("left out")):
        import sora_kernels  # noqa: F401
        from sora_kernels import backend
    HEADER.write_text(header(backend.native_schemas()))
    print(HEADER)


if __name__ == "__main__":
    main()
