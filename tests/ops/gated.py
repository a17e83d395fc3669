"""What the tests of the two gated ops share: leaves, runs by name, and the 2x rule over a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sora_kernels import RowMap, use_backend
from tests.helpers import check, poisoned, randn

BACKENDS = ("native", "triton")
STREAM = ("x",)  # arguments in the dtype of the residual stream; all others are the branch's

#: (stream, branch)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)

ROW_PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "runs": lambda n, r: torch.arange(n) * r // n,
    "shuffled": lambda n, r: torch.randint(0, r, (n,), generator=torch.Generator().manual_seed(3)),
    "empty rows": lambda n, r: (torch.arange(n) * r // n) // 2 * 2,
    "a row a token": lambda n, r: torch.arange(n).flip(0) % r,
}

#: How modulations are given. per, shape of x, leading sizes of the modulations
GRANULARITIES = (
    ("all", (2, 35, 24), ()),
    ("sample", (3, 33, 24), (3,)),
    ("sample", (70, 24), (1,)),
    ("sample", (2, 3, 11, 24), (2,)),
    ("frame", (2, 36, 24), (2, 4)),
    ("token", (2, 17, 24), (2, 17)),
    ("token", (35, 24), (35,)),
)

#: The same for the Triton interpreter, whose backward costs time per token. 70 tokens of one row
#: are more than a program of the forward takes (64) and than the backward's second stage adds at
#: once (16); the others need rows that lie in several programs, and several rows.
SHORT_GRANULARITIES = (
    ("all", (2, 5, 24), ()),
    ("sample", (3, 4, 24), (3,)),
    ("sample", (70, 24), (1,)),
    ("sample", (2, 3, 2, 24), (2,)),
    ("frame", (2, 8, 24), (2, 4)),
    ("token", (2, 3, 24), (2, 3)),
    ("token", (7, 24), (7,)),
)
BY_BACKEND = [("native", *case) for case in GRANULARITIES]
BY_BACKEND += [("triton", *case) for case in SHORT_GRANULARITIES]


def length(backend: str, native: int, triton: int = 5) -> int:
    """Tokens of a sample: the CPU's blocks are of 32 tokens, those of Triton's backward of one."""
    return native if backend == "native" else triton


def leaf(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def make(shape: tuple[int, ...], lead: tuple[int, ...], names: str) -> dict[str, Any]:
    """x and the named arguments; modulations are chunks of one projection, as models make them."""
    width = shape[-1]
    modulations = ("gate", "gate2", "shift", "scale")
    projected = randn(*lead, 6 * width, seed=5)
    arguments: dict[str, Any] = {"x": leaf(*shape, seed=1)}
    for seed, name in enumerate(names.split(), 2):
        if name in modulations:
            start = (modulations.index(name) + 1) * width
            arguments[name] = projected[..., start : start + width].requires_grad_()
        elif name in ("y", "y2"):
            arguments[name] = leaf(*shape, seed=seed)
        else:
            arguments[name] = leaf(width, seed=seed)
    return arguments


def to(tensors: dict[str, Any], stream: torch.dtype, branch: torch.dtype) -> dict[str, Any]:
    """The same leaves in other dtypes (views stay views only if nothing changes)."""

    def cast(name: str, value: Any) -> Any:
        dtype = stream if name in STREAM else branch
        if not isinstance(value, Tensor) or value.dtype == dtype:
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return {name: cast(name, value) for name, value in tensors.items()}


def run(
    op: Callable[..., Any], arguments: dict[str, Any], upstream: list[Tensor | None], **options: Any
) -> dict[str, Tensor]:
    """Outputs and all gradients of one call, by name. No upstream: the output goes unused."""
    result = op(**arguments, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    wanted = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    used = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(wanted.values()), [u for _, u in used], allow_unused=True
    )
    results = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"d{k}": g for k, g in zip(wanted, grads, strict=True) if g is not None}


def compare(
    op: Callable[..., Any],
    backend: str,
    arguments: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    used: tuple[bool, ...] = (True,),
    **options: Any,
) -> dict[str, Tensor]:
    """The 2x rule for outputs, the 3x rule for gradients, with random upstream gradients."""
    stream, branch = dtypes
    arguments = to(arguments, stream, branch)
    shape = arguments["x"].shape
    upstream = [
        randn(*shape, dtype=branch if i else stream, seed=77 + i) if use else None
        for i, use in enumerate(used)
    ]
    double = to(arguments, torch.float64, torch.float64)
    with use_backend("reference"):
        exact = run(op, double, [u if u is None else u.double() for u in upstream], **options)
        lowp = run(op, arguments, upstream, **options)
    with use_backend(backend), poisoned():
        got = run(op, arguments, upstream, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == lowp[name].dtype, name
        # the interpreter truncates where compiled code rounds to bf16
        slack = 1.0 if backend == "triton" and value.dtype is torch.bfloat16 else 0.0
        check(
            value,
            exact[name],
            lowp[name],
            grad=name.startswith("d"),
            extra_ulp=slack,
            name=f"{backend} {name}",
        )
    return got


def assert_law(
    got: Tensor, eager: Tensor, once: Tensor, *intermediates: Tensor, different: float = 0.98
) -> None:
    """At least 99.9% of outputs bit-equal, the rest within 1 ulp of the largest intermediate."""
    assert got.dtype == eager.dtype
    equal = (got == eager).float().mean().item()
    assert equal >= 0.999, f"{equal:.4%} bit-equal"
    largest = max(t.abs().max().item() for t in (eager, *intermediates))
    spacing = 2.0 ** torch.tensor(largest).log2().floor().item() * torch.finfo(got.dtype).eps
    assert (got.double() - eager.double()).abs().max().item() <= spacing
    same = (once == eager).float().mean().item()
    assert same < different, f"the law must make a difference, fp32_once is {same:.4%} equal"


def map_of(pattern: str, tokens: int, count: int) -> RowMap:
    return RowMap.from_index(ROW_PATTERNS[pattern](tokens, count), count)
