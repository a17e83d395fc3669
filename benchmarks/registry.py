"""What a benchmark case is, and how an op's file declares its own.

Every ``benchmarks/bench_<op>.py`` (suite ``ops``), ``block.py`` and ``end_to_end.py`` defines one
function ``cases(context) -> Iterable[Case]``. Declaring a case allocates nothing: the harness
builds the inputs of one case at a time, gives the *same* tensors to all of its providers, checks
that the providers agree, and only then times them, interleaved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch

from sora_kernels import backend

Inputs = dict[str, Any]
Run = Callable[[], object]
Provider = Callable[[Inputs], Run]
"""Builds whatever it needs from the shared inputs, once, and returns the call that is timed."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative L2 distance to the plain provider over which a provider's time is refused. Loose on
# purpose: exactness is the tests' job, this only keeps the time of a wrong result off the table.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
SUITES = ("ops", "block", "e2e", "dropin")
OPS_PATTERN = "bench_*.py"
SUITE_MODULES = {
    "block": "benchmarks.block",
    "e2e": "benchmarks.end_to_end",
    "dropin": "benchmarks.dropin",
}

T = TypeVar("T")


class Unavailable(Exception):
    """Raised by a provider that cannot run here; its message becomes the stated reason."""


@dataclass(frozen=True)
class Context:
    """What a file may look at when it decides which cases to declare."""

    device: str = "cpu"
    quick: bool = False

    def pick(
        self, *, quick: Sequence[T], full: Sequence[T], cuda: Sequence[T] | None = None
    ) -> Sequence[T]:
        """``quick`` under ``--quick``, else ``full``, or ``cuda`` where that is given and a GPU
        is timed: sizes that fill one, fewer of them."""
        if self.quick:
            return quick
        return cuda if cuda is not None and self.device.startswith("cuda") else full


@dataclass(frozen=True)
class Case:
    """One line of the comparison: the same work, done by several providers.

    ``bytes`` is the least the work must move (every input read once, every output written once),
    ``flops`` the operations it must do; together with the measured ceilings they give its floor.
    """

    suite: str
    op: str
    mode: str
    case: str
    dtype: str
    bytes: int
    flops: int
    inputs: Callable[[torch.device], Inputs]
    providers: Mapping[str, Provider]
    tolerance: float | None = (
        None  # None: the dtype's; inf: the providers' results are not compared
    )
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keys of every row
    units: Mapping[str, float] = field(default_factory=dict)  # {"clips": 8} -> row["clips_per_s"]
    # Providers that are all plain PyTorch: the fastest of them is reported as ``plain`` too.
    plain_variants: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.mode}/{self.case}/{self.dtype}"


def tensors_of(result: object) -> list[torch.Tensor]:
    """The tensors in a provider's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors_of(part)]
    return []


def forward(function: Callable[..., object]) -> Provider:
    """A provider that calls ``function(**inputs)`` without recording a graph."""

    def build(inputs: Inputs) -> Run:
        def run() -> object:
            with torch.no_grad():
                return function(**inputs)

        return run

    return build


def backward(function: Callable[..., object], grads: Sequence[str]) -> Provider:
    """A provider that times the backward alone: the graph is recorded once, outside the clock.

    The upstream gradients are random, the same for every provider of a case, and dense in the
    memory format of the result, as the layer above would give them.
    """

    def build(inputs: Inputs) -> Run:
        leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
        outputs = tensors_of(function(**{**inputs, **leaves}))
        generator = torch.Generator(device=outputs[0].device).manual_seed(1)
        upstream = [torch.empty_like(o).normal_(generator=generator) for o in outputs]
        wanted = list(leaves.values())
        return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

    return build


def ahead_of_time(
    op: str, ours: Callable[..., object], context: Context
) -> dict[str, Callable[..., object]]:
    """On CUDA the provider ``cuda``: our op by the kernels of csrc/cuda instead of Triton's."""
    if not context.device.startswith("cuda"):
        return {}

    def function(**inputs: Any) -> object:
        if reason := backend.why_not(op, "native", "cuda"):
            raise Unavailable(reason)
        with backend.use_backend("native"):
            return ours(**inputs)

    return {"cuda": function}


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """``torch.compile`` with static shapes, as a user who cares for speed would call it."""
    return torch.compile(function, dynamic=False)


def op_cases(
    op: str,
    case: str,
    dtype: str,
    *,
    inputs: Callable[[torch.device], Inputs],
    ours: Callable[..., object],
    plain: Callable[..., object],
    bytes: Mapping[str, int],
    flops: Mapping[str, int],
    grads: Sequence[str] = (),
    peers: Mapping[str, Callable[..., object]] | None = None,
    compile: Callable[..., object] | bool = True,
    tolerance: float | None = None,
) -> list[Case]:
    """The forward and backward cases of one op at one shape.

    Args:
        inputs: ``device -> {argument name: tensor or object}``; random data, never zeros.
        ours, plain: called as ``f(**inputs)``; return a tensor or a tuple of tensors in the same
            order. ``plain`` is the idiomatic eager PyTorch, in its fastest form.
        compile: what ``torch.compile`` gets: ``plain`` (True), another form of it that compiles
            better, or nothing (False).
        bytes, flops: per mode, e.g. ``{"fwd": 2 * n, "bwd": 3 * n}``; its keys are the modes.
        grads: names of the inputs that the backward differentiates.
        peers: further providers by name, called like ``plain``; one that cannot run here raises
            `Unavailable` and is listed with that reason.
    """
    functions: dict[str, Callable[..., object]] = {"sora_kernels": ours, "plain": plain}
    if compile:
        functions["compile"] = compile if callable(compile) else plain
    functions.update(peers or {})

    def providers(mode: str) -> dict[str, Provider]:
        def of(name: str, function: Callable[..., object]) -> Provider:
            def build(inputs: Inputs) -> Run:
                called = compiled(function) if name == "compile" else function
                return (forward(called) if mode == "fwd" else backward(called, grads))(inputs)

            return build

        return {name: of(name, function) for name, function in functions.items()}

    return [
        Case(
            suite="ops",
            op=op,
            mode=mode,
            case=case,
            dtype=dtype,
            bytes=bytes[mode],
            flops=flops[mode],
            inputs=inputs,
            providers=providers(mode),
            tolerance=tolerance,
        )
        for mode in bytes
    ]


def load(
    suites: Sequence[str], context: Context, only: str | None = None, file: str | None = None
) -> list[Case]:
    """All cases of ``suites``, in file order.

    ``only`` keeps an op, a glob over ``Case.name``, or several of these with ``|`` between;
    ``file`` keeps what ``bench_<file>.py`` declares.
    """
    cases: list[Case] = []
    found = [module for suite in suites for module in modules(suite)]
    if file is not None:
        files = [module.partition("bench_")[2] for module in found]
        if file not in files:
            raise ValueError(
                f"--file: expected one of {', '.join(filter(None, files))}, got {file}"
            )
        found = [module for module, name in zip(found, files, strict=True) if name == file]
    for module in found:
        cases.extend(importlib.import_module(module).cases(context))
    if only is None:
        return cases
    patterns = only.split("|")
    kept = [c for c in cases if c.op in patterns or any(fnmatch(c.name, p) for p in patterns)]
    if not kept:
        names = ", ".join(sorted({c.op for c in cases}))
        raise ValueError(f"--only {only!r} matches no case; ops are: {names}")
    return kept


def modules(suite: str) -> Iterable[str]:
    """The benchmark modules of a suite."""
    if suite == "ops":
        files = sorted(Path(__file__).parent.glob(OPS_PATTERN))
        return [f"benchmarks.{file.stem}" for file in files]
    return [SUITE_MODULES[suite]]
