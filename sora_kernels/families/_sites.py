"""What adapters decide at every call: whether a site's op may stand in for upstream's modules.

A norm is read only if it is of the exact class whose formula is restated and nothing has been put
around it; anything else (hooks, wrappers, offloading, a forward of its own, a sharded weight) means
that the site runs upstream's modules. The answer may change between calls, so nothing is kept.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..laws import Point
from ..packing import Rope

Made = TypeVar("Made")

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


def plain(*tensors: Tensor) -> bool:
    """False for tensors of a subclass, such as sharded ones, which raw ops do not understand."""
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def streams(x: Tensor, *branches: Tensor) -> bool:
    """True if the ops take this residual stream and these branches as they are."""
    if x.dtype not in FLOATS or not plain(x):
        return False
    for y in branches:
        if not plain(y) or y.shape != x.shape or y.device != x.device:
            return False
        if y.dtype != x.dtype and not (x.dtype is torch.float32 and y.dtype in HALVES):
            return False
    return True


def bias_of(norm: nn.Module) -> Tensor | None:
    """RMS norms have no bias, LayerNorms may."""
    found: Any = getattr(norm, "bias", None)
    return found if found is None or isinstance(found, Tensor) else None


def modulates(x: Tensor, *parts: Tensor) -> bool:
    """True if the ops take these parts of a modulation, whose sum has the dtype of ``x``."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return x.dtype in FLOATS and dtype is x.dtype and plain(x, *parts)


def untouched(module: nn.Module, cls: type) -> bool:
    """True if ``module`` is exactly a ``cls`` that nothing was put around: its parts may be called
    one by one in its place."""
    return type(module) is cls and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def promotes(x: Tensor, *parts: Tensor) -> bool:
    """True if upstream's sum of these modulation parts leaves the stream in its dtype."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.promote_types(dtype, x.dtype) is x.dtype


def scale_for(scale: Tensor, x: Tensor) -> Tensor:
    """``scale`` such that ``1 + scale`` rounds as upstream's, also if it is narrower than ``x``."""
    return scale if scale.dtype is x.dtype else (1 + scale).to(x.dtype) - 1


def gated_law(law: int, gate: torch.dtype, y: Tensor) -> int:
    """Gate and gated branch are rounded to the branch's dtype unless the gate is wider."""
    narrow = torch.promote_types(gate, y.dtype) is y.dtype
    return law if narrow else law & ~int(Point.GATED | Point.TABLE)


def normed_law(law: int, x: Tensor) -> int:
    """Autocast on a GPU keeps the norm of a half stream and its modulation in fp32; the linear
    layer that follows rounds once, which is then the op's own rounding."""
    if x.is_cuda and x.dtype in HALVES and torch.is_autocast_enabled("cuda"):
        return law & ~int(Point.XHAT | Point.AFFINE | Point.PRODUCT | Point.SUM)
    return law


def _forget(kept: list[Any], _: Any) -> None:
    kept.clear()


def readable_mask(mask: Any) -> bool:
    """True if the numbers of this mask may be looked at, and kept while the next blocks bring it.

    Not while compiling or capturing a graph, nor those of a tensor that is learned or that does not
    count its changes.
    """
    return (
        type(mask) is Tensor
        and not torch.compiler.is_compiling()
        and not mask.requires_grad
        and not mask.is_inference()
        and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def remembered(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make(mask, *numbers)``, kept while the next blocks bring the very same tensor.

    One entry, which goes when the tensor does. On a GPU reading a mask waits for the device: so
    that happens once for all blocks of a step.
    """
    last: list[Any] = []

    @functools.wraps(make)
    def call(mask: Tensor, *numbers: int) -> Made:
        if not readable_mask(mask):
            return make(mask, *numbers)
        key = (mask._version, *numbers)
        if not last or last[0]() is not mask or last[1] != key:
            made = make(mask, *numbers)
            last[:] = [weakref.ref(mask, functools.partial(_forget, last)), key, made]
        return cast(Made, last[2])

    return call


_last_rope: list[Any] = []


def remembered_rope(cos: Tensor, sin: Tensor, heads: int, make: Callable[..., Rope]) -> Rope:
    """``make(cos, sin, heads)``, kept while the next blocks bring the very same tables.

    One entry, which goes when the tables do. Not while compiling or capturing a graph, and not for
    tables with a gradient.
    """
    if (
        torch.compiler.is_compiling()
        or cos.requires_grad
        or sin.requires_grad
        or cos.is_inference()
        or (cos.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return make(cos, sin, heads)
    key = (cos._version, sin._version, heads, make)
    if _last_rope and _last_rope[0]() is cos and _last_rope[1]() is sin and _last_rope[2] == key:
        return _last_rope[3]
    rope = make(cos, sin, heads)
    gone = weakref.ref(cos, functools.partial(_forget, _last_rope))
    _last_rope[:] = [gone, weakref.ref(sin), key, rope]
    return rope
