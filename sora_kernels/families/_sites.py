"""What adapters decide at every call: whether a site's op may stand in for upstream's modules.

A norm is read only if it is of the exact class whose formula is restated and nothing has been put
around it; anything else (hooks, wrappers, offloading, a forward of its own, a sharded weight) means
that the site runs upstream's modules. The answer may change between calls, so nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def why_unreadable(norm: nn.Module, *classes: type) -> str | None:
    """Why the parameters of ``norm`` may not be read instead of calling it, or None."""
    if type(norm) not in classes:
        return f"{type(norm).__name__} is not {' or '.join(c.__name__ for c in classes)}"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "the norm has forward hooks"
    if norm._backward_hooks or norm._backward_pre_hooks:
        return "the norm has backward hooks"
    if "forward" in norm.__dict__:
        return "the norm has a forward of its own"
    for name in ("weight", "bias"):
        parameter = getattr(norm, name, None)
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"the norm's {name} is a {type(parameter).__name__}"
    return None


def readable(norm: nn.Module, *classes: type) -> bool:
    """True if the op may read ``norm``, which must be of one of exactly these ``classes``."""
    return why_unreadable(norm, *classes) is None


def streams(x: Tensor, *branches: Tensor) -> bool:
    """True if the ops take this residual stream and these branches as they are."""
    if x.dtype not in FLOATS:
        return False
    for y in branches:
        if y.shape != x.shape or y.device != x.device:
            return False
        if y.dtype != x.dtype and not (x.dtype is torch.float32 and y.dtype in HALVES):
            return False
    return True


def bias_of(norm: nn.Module) -> Tensor | None:
    """RMS norms have no bias, LayerNorms may."""
    found: Any = getattr(norm, "bias", None)
    return found if found is None or isinstance(found, Tensor) else None


def modulates(x: Tensor, *parts: Tensor) -> bool:
    """True if a modulation added up of these has the dtype of ``x``: else upstream promotes."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return x.dtype in FLOATS and dtype is x.dtype


def gate_law(x: Tensor, y: Tensor, law: int) -> int:
    """Upstream rounds a gated branch only if both streams are half; beside fp32 nothing rounds."""
    return law if y.dtype is x.dtype else 0
