"""What a call costs besides its kernel: 64 x 64 tensors, against the raw op without its checks.

``bare`` is the raw op called past its autograd guard with every argument at hand; with gradients,
in a `torch.autograd.Function` that saves the same tensors. The difference to ``sora_kernels`` is
what the public function adds: checks, granularity, choice of the implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sora_kernels import gate_residual, gate_residual_norm_modulate, norm_modulate

from .registry import Case, Context, Inputs, Provider, Run, forward

SIZE = 64


def inputs(names: str, device: torch.device) -> Inputs:
    return {
        name: torch.randn(SIZE if name in ("x", "y") else 1, SIZE, device=device)
        for name in names.split()
    }


def public_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Any:
    return norm_modulate(x, shift, scale)


def raw_norm(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.sora_kernels.norm_modulate_fwd.default(
        x.unsqueeze(0), None, None, shift, scale, None, None, None, None, None, SIZE, 1e-6, False,
        0, torch.float32,
    )  # fmt: skip
    return results


def raw_norm_bwd(saved: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    x, shift, scale, _, _, mean, rstd = saved
    grads = torch.ops.sora_kernels.norm_modulate_bwd.default(
        dy, None, x.unsqueeze(0), mean, rstd, None, None, shift, scale, None, None, None, None,
        None, None, None, SIZE, False, 0, 0b11001,
    )  # fmt: skip
    return grads[0][0], grads[3], grads[4]


def public_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return gate_residual(x, y, gate)


def raw_gate(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.sora_kernels.gate_residual_fwd.default(
        x.unsqueeze(0), y.unsqueeze(0), gate, None, None, None, SIZE, False, 0, 1e-6, 0
    )
    return results


def raw_gate_bwd(saved: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    _, y, gate, _, mean, rstd = saved
    dy, dgate, _ = torch.ops.sora_kernels.gate_residual_bwd.default(
        dout, y.unsqueeze(0), mean, rstd, gate, None, None, None, None, None, SIZE, False, 0, 0,
        torch.float32, 0b11,
    )  # fmt: skip
    return dout[0], dy[0], dgate


def public_both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
    return gate_residual_norm_modulate(x, y, gate, shift, scale)


def raw_both(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.sora_kernels.gate_residual_norm_modulate_fwd.default(
        x.unsqueeze(0), y.unsqueeze(0), None, gate, None, None, None, shift, scale, None, None,
        None, None, SIZE, 1e-6, False, 0, torch.float32,
    )  # fmt: skip
    return results


def raw_both_bwd(saved: tuple[Tensor, ...], dx: Tensor, dnormed: Tensor) -> tuple[Tensor, ...]:
    x, y, gate, shift, scale, _, _, mean, rstd = saved
    grads = torch.ops.sora_kernels.gate_residual_norm_modulate_bwd.default(
        dx, dnormed, x.unsqueeze(0), y.unsqueeze(0), None, mean, rstd, gate, None, None, None,
        shift, scale, None, None, None, None, None, None, SIZE, False, 0, torch.float32,
        0b110001011,
    )  # fmt: skip
    return grads[0][0], grads[1][0], grads[3], grads[7], grads[8]


#: op -> public function, raw forward, raw backward, arguments, number of results
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], str, int]] = {
    "norm_modulate": (public_norm, raw_norm, raw_norm_bwd, "x shift scale", 1),
    "gate_residual": (public_gate, raw_gate, raw_gate_bwd, "x y gate", 1),
    "gate_residual_norm_modulate": (
        public_both, raw_both, raw_both_bwd, "x y gate shift scale", 2,
    ),
}  # fmt: skip


class _Bare(torch.autograd.Function):
    """The raw ops of ``OPS[op]`` with the least around them that autograd takes."""

    @staticmethod
    def forward(ctx: Any, op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, run, _, _, count = OPS[op]
        with torch._C._AutoDispatchBelowAutograd():
            results = run(*tensors)
        ctx.save_for_backward(*tensors, *results)
        ctx.op = op
        return tuple(results[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return None, *OPS[ctx.op][2](ctx.saved_tensors, *grads)


def bare(op: str, **tensors: Tensor) -> list[Tensor]:
    _, run, _, _, count = OPS[op]
    with torch._C._AutoDispatchBelowAutograd():
        return [y[0] for y in run(**tensors)[:count]]


def bare_function(op: str, **tensors: Tensor) -> list[Tensor]:
    return [y[0] for y in _Bare.apply(op, *tensors.values())]


def both_ways(function: Callable[..., Any]) -> Provider:
    """Forward and backward in one call, all gradients wanted."""

    def build(tensors: Inputs) -> Run:
        leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        wanted = list(leaves.values())
        generator = torch.Generator(device=leaves["x"].device).manual_seed(1)
        upstream = torch.randn(SIZE, SIZE, device=leaves["x"].device, generator=generator)

        def run() -> object:
            result = function(**leaves)
            outputs = result if isinstance(result, (list, tuple)) else [result]
            return torch.autograd.grad(outputs, wanted, [upstream] * len(outputs))

        return run

    return build


def cases(context: Context) -> Iterable[Case]:
    if context.quick:
        return
    for op, (public, _, _, names, count) in OPS.items():
        elements = (names.count(" ") + 1 + count) * SIZE * SIZE
        for mode, ours, least in (
            ("fwd", forward(public), forward(partial(bare, op))),
            ("fwd+bwd", both_ways(public), both_ways(partial(bare_function, op))),
        ):
            yield Case(
                suite="ops",
                op="dispatch",
                mode=mode,
                case=f"{op} {SIZE}x{SIZE}",
                dtype="fp32",
                bytes=4 * elements,
                flops=10 * elements,
                inputs=partial(inputs, names),
                providers={"sora_kernels": ours, "bare": least},
            )
