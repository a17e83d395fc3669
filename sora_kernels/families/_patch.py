"""Linking a block's ``forward`` to ours and undoing it: instances only, never classes.

A link is ``functools.partial(fn, block, plan)`` with ``fn`` at module level, wrapped by
``functools.update_wrapper``. That is the form which survives what people do with models: a closure
would run the old module's weights after ``deepcopy``, a bound method of another module breaks
pickle, a swapped ``__class__`` is undone or ignored under hooks and loses the class of FSDP.

Hooks of diffusers and accelerate wrap ``forward`` too. Ours goes innermost, in place of the class's
own method, so that hooks keep seeing what they saw. Where that place cannot be found, the block is
left alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import backend


@dataclass(frozen=True)
class Slot:
    """A place that may hold the innermost forward of a module: ``holder.name``."""

    holder: Any
    name: str

    def get(self) -> Any:
        return getattr(self.holder, self.name)

    def set(self, value: Any) -> None:
        setattr(self.holder, self.name, value)


def upstream_class(module: nn.Module) -> type:
    """The class that a module was made of; FSDP2 puts one of its own in front."""
    cls = type(module)
    if cls.__name__.startswith("FSDP") and any(b.__name__ == "FSDPModule" for b in cls.__bases__):
        return next(b for b in cls.__mro__[1:] if b.__name__ != "FSDPModule")
    return cls


def upstream_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the class of ``module`` computes: for calls that an adapter does not restate.

    Warned of once, and kept for :func:`sora_kernels.explain`.
    """
    cls = upstream_class(module)
    if not torch.compiler.is_compiling():
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        reason = "shapes, dtypes or arguments of a call are not those that are restated"
        backend._record(cls.__name__, device, "upstream", reason)
    forward: Any = cls.forward  # type: ignore[attr-defined]
    return forward(module, *args, **kwargs)


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_link(value: Any) -> bool:
    """True for what :func:`link` puts in."""
    return isinstance(value, functools.partial) and value.func.__module__.startswith(
        f"{__package__}."
    )


def slots(module: nn.Module) -> Iterator[Slot]:
    """Every place where a forward of ``module`` is kept: by itself or by hooks around it."""
    registry = getattr(module, "_diffusers_hook", None)
    for reference in getattr(registry, "_fn_refs", ()):
        yield Slot(reference, "original_forward")
        yield Slot(reference, "forward")
    if "_old_forward" in module.__dict__:  # hooks of accelerate
        yield Slot(module, "_old_forward")
    yield Slot(module, "forward")


def _is_own(value: Any, module: nn.Module) -> bool:
    """The method of the module's class, bound to the module."""
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is module
        and value.__func__ is upstream_class(module).__dict__.get("forward")
    )


def find_slot(module: nn.Module) -> Slot | str:
    """Where a link belongs or is already; or why there is no such place."""
    for slot in slots(module):
        if is_link(slot.get()) or _is_own(slot.get(), module):
            return slot
    found = module.__dict__.get("forward", module.forward)
    name = getattr(found, "__qualname__", None) or type(found).__name__
    return f"its forward is {name}, not that of its class"


def link(module: nn.Module, fn: Callable[..., Any], plan: Any) -> None:
    """Makes ``module`` run ``fn(module, plan, *args, **kwargs)``, innermost.

    Raises:
        ValueError: there is no such place; :func:`find_slot` says so beforehand.
    """
    slot = find_slot(module)
    if isinstance(slot, str):
        raise ValueError(slot)
    own = upstream_class(module).__dict__["forward"].__get__(module)
    slot.set(functools.update_wrapper(functools.partial(fn, module, plan), own))


def unlink(module: nn.Module) -> bool:
    """Puts the class's own forward back where our link is; True if there was one."""
    for slot in slots(module):
        if not is_link(slot.get()):
            continue
        if slot.holder is module and slot.name == "forward":
            del module.forward
        else:
            slot.set(upstream_class(module).__dict__["forward"].__get__(module))
        return True
    return False
