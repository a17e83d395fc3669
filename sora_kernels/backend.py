"""Which implementation of an op runs, and why the others do not.

Every op has up to three implementations:

- ``reference``: plain PyTorch, any device, any float dtype, differentiable by autograd;
- ``native``: C++ on the CPU, CUDA kernels compiled ahead of time on CUDA (some ops have these);
- ``triton``: Triton kernels on CUDA (and on the CPU when ``TRITON_INTERPRET=1``, for tests).

On CUDA ``triton`` runs, unless the op's ``configs/backend.json`` (from committed measurements) says
that ``native`` is faster at a width, or Triton cannot run the call and ``native`` can.

The public function of an op asks :func:`choose` once and hands the answer to forward and backward
alike; :func:`implementation` turns it into a callable. :func:`register` registers the raw ops
``torch.ops.sora_kernels.*``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import _ext

NAMESPACE = "sora_kernels"
BACKENDS = ("reference", "native", "triton")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_native_ops: set[str] = set()  # ops whose CPU kernel the loaded C++ library provides
_schemas: dict[str, tuple[str, str]] = {}  # ops that C++ implements -> forward, backward
_cuda_ops: dict[str, bool] = {}  # raw ops meant for the CUDA library -> whether it has them
_measured: dict[str, list[dict[str, Any]]] = {}  # op -> where `native` is faster on CUDA
_calls: dict[tuple[str, str, bool], Callable[..., Any]] = {}  # raw ops past their guards
_override: str | None = None
_decisions: dict[tuple[str, str], tuple[str, str]] = {}  # (op, device) -> (backend, reason)
_settled: dict[tuple[str, bool, torch.dtype], str] = {}  # calls that take the device's fast path

HAS_TRITON: bool = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if Triton kernels run in the CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_INTERPRETING = interpreting()


# --- registration -------------------------------------------------------------------------------


def define(schema: str) -> None:
    """Defines a raw op by its schema, e.g. ``"patchify_fwd(Tensor x, SymInt n) -> Tensor"``.

    The C++ library brings the schemas of what it implements, so that it serves a process without
    Python; here they are only compared. Whether it implements the op is how ``native`` is found.

    Raises:
        ImportError: the library defines the op with another schema.
    """
    name = schema.split("(", 1)[0].strip()
    found = torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::{name}")
    if not found:
        _library.define(schema)
    elif found[0] != torch._C.parse_schema(f"{NAMESPACE}::{schema}"):
        raise ImportError(
            f"the compiled library was built from other sources (it has {found[0]}, expected "
            f"{NAMESPACE}::{schema}): build it again, or delete {NAMESPACE}/_C_*.so"
        )
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"):
        _native_ops.add(name)


def implement(op: str, key: str, fn: Callable[..., Any]) -> None:
    """Registers ``fn`` as the kernel of a raw op for a dispatch key ("CPU" or "CUDA")."""
    _library.impl(op, fn, key)
    if key == "CPU":
        _native_ops.add(op)


def fake(op: str, fn: Callable[..., Any]) -> None:
    """Registers the shape function of a raw op (meta device, FakeTensor, torch.compile)."""
    torch.library.register_fake(f"{NAMESPACE}::{op}", fn, lib=_library)


def guard_autograd(op: str) -> None:
    """Makes a direct call of a raw op raise when a gradient would be lost.

    Raw ops know no autograd (it lives in an ``autograd.Function`` outside); PyTorch would return
    a tensor that silently carries no gradient.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default

    def guarded(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    raise RuntimeError(
                        f"torch.ops.{NAMESPACE}.{op} has no gradient: an input requires grad; "
                        f"call the public function in {NAMESPACE}, or use torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _library.impl(op, guarded, "Autograd")


def register(
    op: str,
    forward: str,
    backward: str,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    *,
    cpu: str | None = None,
    cuda: bool = False,
) -> None:
    """Defines the raw ops ``<op>_fwd`` and ``<op>_bwd`` of an op folder.

    ``forward`` and ``backward`` are schemas without the name. On CUDA they run ``forward`` and
    ``backward`` of the folder's ``kernels.py``, on the CPU what the C++ library has, or those of
    the folder's module ``cpu`` if the op is PyTorch's own kernels there. ``cuda``: csrc/cuda has
    kernels of the op as well; these are the raw ops ``<op>_fwd_cuda`` and ``<op>_bwd_cuda``.
    """
    if cpu is None:
        _schemas[op] = (forward, backward)
    if cuda:
        _measured[op] = _read_measured(Path(__file__).parent / "ops" / op / "configs")
    for direction, schema, shapes in (
        ("fwd", forward, fake_forward),
        ("bwd", backward, fake_backward),
    ):
        name = f"{op}_{direction}"
        define(name + schema)
        fake(name, shapes)
        implement(name, "CUDA", functools.partial(_launch, op, direction, "kernels"))
        if cpu is not None:
            implement(name, "CPU", functools.partial(_launch, op, direction, cpu))
        guard_autograd(name)
        if cuda:
            ahead = f"{name}_cuda"
            define(ahead + schema)
            fake(ahead, shapes)
            guard_autograd(ahead)
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{ahead}", "CUDA")
            _cuda_ops[ahead] = found


def native_schemas() -> dict[str, tuple[str, str]]:
    """Forward and backward schemas, without the names, of the ops that csrc implements."""
    return dict(_schemas)


def cuda_ops() -> list[str]:
    """Names of the raw ops that csrc/cuda implements, whether it is loaded here or not."""
    return sorted(_cuda_ops)


def _read_measured(folder: Path) -> list[dict[str, Any]]:
    """Where the ahead-of-time kernels of an op were measured to be the faster ones.

    ``backend.json`` is a list of ``{"capability": [9, 0], "dtype": "bfloat16", "widths": [1, 512],
    "backend": "native"}``, both widths included. Without the file nothing was measured.
    """
    path = folder / "backend.json"
    if not path.exists():
        return []
    rules: list[dict[str, Any]] = json.loads(path.read_text())
    for rule in rules:
        if set(rule) != {"capability", "dtype", "widths", "backend"} or rule["backend"] != "native":
            raise ValueError(f"{path}: expected capability, dtype, widths, backend: got {rule}")
    return rules


def _launch(op: str, direction: str, module: str, *args: Any) -> Any:
    return _launcher(op, direction, module)(*args)


def _launcher(op: str, direction: str, module: str = "kernels") -> Callable[..., Any]:
    """What runs an op outside C++. Imported late: a machine without Triton needs no kernels."""
    launchers = importlib.import_module(f"{NAMESPACE}.ops.{op}.{module}")
    return launchers.forward if direction == "fwd" else launchers.backward


def implementation(op: str, direction: str, chosen: str, tensor: Tensor) -> Callable[..., Any]:
    """What runs ``op`` ("fwd" or "bwd") for a backend other than the reference."""
    if chosen == "triton" and not tensor.is_cuda:  # the interpreter
        return _launcher(op, direction)
    ahead = tensor.is_cuda and chosen == "native"
    call = None if torch.compiler.is_compiling() else _calls.get((op, direction, ahead))
    if call is not None:
        return call
    name = f"{op}_{direction}_cuda" if ahead else f"{op}_{direction}"
    raw: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    if torch.compiler.is_compiling():
        return raw
    call = _calls[op, direction, ahead] = functools.partial(_below_autograd, raw)
    return call


def _below_autograd(raw: Callable[..., Any], *args: Any) -> Any:
    """Past the guard, which is Python called from C++ and would take as long as a small kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return raw(*args)


# --- choice -------------------------------------------------------------------------------------


def _unavailable(backend: str, op: str, device: str, dtype: torch.dtype | None) -> str | None:
    """Why ``backend`` cannot run ``op`` here, or None if it can."""
    if backend == "reference":
        return None
    if dtype is torch.float64:
        return "kernels compute in fp32; fp64 runs the reference"
    if backend == "native":
        if device == "cuda":
            if f"{op}_fwd_cuda" not in _cuda_ops:
                return f"there is no ahead-of-time CUDA kernel for {op}"
            if not _cuda_ops[f"{op}_fwd_cuda"]:
                return _ext.missing.get("_C_cuda", f"the CUDA library has no kernel for {op}")
            return None
        if device not in ("cpu", "meta"):
            return f"there is no native kernel for device {device}"
        if device == "cpu" and f"{op}_fwd" not in _native_ops:
            return _ext.missing.get("_C_cpu", f"the C++ library has no kernel for {op}")
        return None
    if not HAS_TRITON:
        return "triton is not installed"
    if device == "cuda" and not _INTERPRETING:
        return None
    if device == "cpu" and _INTERPRETING:
        return None
    return f"triton does not run on device {device}"


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs ``op`` on tensors like ``tensor``.

    A choice other than the device's fast path is recorded for :func:`explain` and warned of once.

    Raises:
        ValueError: :func:`use_backend` forces a backend that cannot run here.
    """
    compiling = torch.compiler.is_compiling()
    if _override is None and not compiling:
        settled = _settled.get((op, tensor.is_cuda, tensor.dtype))
        if settled is not None and (tensor.is_cuda or tensor.is_cpu):
            return settled
    # a device's type is a new string each time, slower than all the rest of this function
    device = "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type
    if _override is not None:
        reason = _unavailable(_override, op, device, tensor.dtype)
        if reason is not None:
            raise ValueError(f"use_backend({_override!r}) cannot run {op}: {reason}")
        return _override
    fast, reason = _fastest(op, tensor, device)
    if not compiling:
        _record(op, device, fast, reason, warn=fast == "reference")
        lasting = device in ("cpu", "cuda") and not (device == "cuda" and _measured.get(op))
        if fast != "reference" and lasting:
            _settled[op, tensor.is_cuda, tensor.dtype] = fast
    return fast


def _fastest(op: str, tensor: Tensor, device: str) -> tuple[str, str | None]:
    """The backend for a call, and why no (faster) kernel, or not the usual one, runs it."""
    if device != "cuda":
        reason = _unavailable("native", op, device, tensor.dtype)
        return ("native", None) if reason is None else ("reference", reason)
    rule = _measured_rule(op, tensor)
    if rule is not None and _unavailable("native", op, device, tensor.dtype) is None:
        low, high = rule["widths"]
        return "native", f"measured faster than triton at widths {low} to {high}"
    reason = _unavailable("triton", op, device, tensor.dtype)
    if reason is None:
        return "triton", None
    no_native = _unavailable("native", op, device, tensor.dtype)
    return ("native", f"not triton: {reason}") if no_native is None else ("reference", reason)


def _measured_rule(op: str, tensor: Tensor) -> dict[str, Any] | None:
    rules = _measured.get(op)
    if not rules:
        return None
    capability = list(_capability(tensor.device.index))
    dtype = str(tensor.dtype).removeprefix("torch.")
    for rule in rules:
        low, high = rule["widths"]
        if rule["capability"] == capability and rule["dtype"] == dtype:
            if low <= tensor.shape[-1] <= high:
                return rule
    return None


def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


# What torch.compiler.assume_constant_result does, without importing all of torch._dynamo.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _record(op: str, device: str, backend: str, reason: str | None, warn: bool = True) -> None:
    decision = (backend, reason or "")
    if _decisions.get((op, device)) == decision:
        return
    _decisions[op, device] = decision
    _settled.clear()  # the next call on the fast path says so again
    if warn and reason is not None and "fp64" not in reason:  # fp64 is asked for on purpose
        warnings.warn(f"sora_kernels.{op} runs the {backend} path: {reason}", stacklevel=4)


def forced() -> str | None:
    """The backend that :func:`use_backend` forces, or None."""
    return _override


def record(op: str, device: str, implementation: str, reason: str) -> None:
    """Notes for :func:`explain` what ran a call, and why nothing faster did."""
    _decisions[op, device] = (implementation, reason)


def fall_back(op: str, tensor: Tensor, reason: str) -> str:
    """Records that the chosen kernel cannot run this call, and returns what does.

    That is ``"native"`` where Triton's was chosen on CUDA and there is an ahead-of-time kernel,
    else ``"reference"``.
    """
    device = tensor.device.type
    ahead = device == "cuda" and _unavailable("native", op, device, tensor.dtype) is None
    chosen = "native" if ahead and _override is None else "reference"
    if not torch.compiler.is_compiling():
        _record(op, device, chosen, reason, warn=chosen == "reference")
    return chosen


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Forces one backend for every op, until changed or (as a context manager) until the exit.

    ``None`` restores the automatic choice. The choice is a module-level value, not per thread:
    a context variable would break ``torch.compile(fullgraph=True)``.

    Raises:
        ValueError: unknown name.
    """
    global _override
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name: expected one of {BACKENDS} or None, got {name!r}")
    previous, _override = _override, name

    @contextmanager
    def restore() -> Iterator[None]:
        global _override
        try:
            yield
        finally:
            _override = previous

    return restore()


def explain() -> str:
    """One line per op and device used so far: the backend that ran, and why not the fast one."""
    if not _decisions:
        return "no op has run yet"
    lines = []
    for (op, device), (backend, reason) in sorted(_decisions.items()):
        lines.append(f"{op} on {device}: {backend}" + (f" ({reason})" if reason else ""))
    return "\n".join(lines)


def why_not(op: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on a device type, or None if it can (for ``info``)."""
    return _unavailable(backend, op, device, None)
