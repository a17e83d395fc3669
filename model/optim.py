"""Muon: momentum whose matrices are orthogonalised before the step (Jordan et al. 2024).

At toy scale on CPUs, training is limited by the number of optimiser steps; this is what makes
each one count.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T, by the quintic Newton-Schulz iteration of Muon.

    Singular values end near one (0.7 to 1.2), which is all the optimiser needs. Every iterate is
    (polynomial of the Gram matrix) @ matrix, so only the small Gram matrix is iterated.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.mT
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    total = eye
    for _ in range(iterations):
        step = torch.addmm(a * eye + b * gram, gram, gram, alpha=c)
        total = step @ total
        gram = step @ gram @ step
    x = total @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of at least two dimensions; all but the first are flattened to the columns."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"parameters: expected matrices, got {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closure: not supported")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                stretch = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(
                    orthogonalise(update).view_as(parameter), alpha=-group["lr"] * stretch
                )
