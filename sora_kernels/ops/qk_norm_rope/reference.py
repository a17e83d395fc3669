"""The definition of ``qk_norm_rope`` in plain PyTorch: the oracle of the tests.

One head row ``x`` of width D, with rotation angles theta_j of its r/2 pairs (r <= D)::

    xhat = x * rstd                  norm="rms"       rstd = 1 / sqrt(mean_D(x^2) + eps)
    xhat = x * rstd                  norm="rms_full"  the mean runs over all heads of the token
    xhat = (x - mean) * rstd         norm="layer"     rstd = 1 / sqrt(var_D(x) + eps)
    xhat = x                         norm=None
    u    = xhat * weight + bias
    y_a  = u_a * cos(theta_j) - u_b * sin(theta_j)
    y_b  = u_b * cos(theta_j) + u_a * sin(theta_j)

Pair j joins the components (a, b)::

    interleaved    (2j, 2j + 1)                            Wan, Flux, HunyuanVideo, CogVideoX
    half           (j, j + r/2)                            NeoX: Cosmos, MiniMax-H3 (r < D)
    half_per_axis  the same inside each axis' own slice    Open-Sora-Plan, Allegro

Components at and after r pass through unrotated. Everything is computed in fp32 (fp64 for fp64
inputs) and rounded to the dtype of the inputs once at the end, and before that where the rounding
law says: xhat, u ("affine" or "pre_rope"), and under "rope" (a rotation done in the storage dtype)
cos, sin and each of the four products. A rounding is the identity to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

__all__ = ["expand_tables", "pair_columns", "qk_norm_rope_reference"]


def pair_columns(pairing: str, axes: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Columns a and b of every rotated pair, in table order."""
    half = sum(axes) // 2
    if pairing == "interleaved":
        return [2 * j for j in range(half)], [2 * j + 1 for j in range(half)]
    if pairing == "half":
        return list(range(half)), [j + half for j in range(half)]
    first: list[int] = []
    second: list[int] = []
    start = 0
    for size in axes:
        first += range(start, start + size // 2)
        second += range(start + size // 2, start + size)
        start += size
    return first, second


def expand_tables(
    cos: Tensor, sin: Tensor, position_index: Tensor, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Per-token cos and sin, ``[N, 1 or H, r/2]``: what the kernels never write down."""
    if position_index.shape[-1] == 1:
        axis_of_pair = torch.zeros(sum(axes) // 2, dtype=torch.long, device=cos.device)
    else:
        sizes = torch.tensor([size // 2 for size in axes], device=cos.device)
        axis_of_pair = torch.repeat_interleave(torch.arange(len(axes), device=cos.device), sizes)
    row = position_index.long()[:, axis_of_pair]  # [N, r/2]
    pair = torch.arange(row.shape[1], device=cos.device)
    if cos.ndim == 2:
        return cos[row, pair].unsqueeze(1), sin[row, pair].unsqueeze(1)
    # [P, H, r/2] gathered at (row, pair) gives [N, r/2, H]
    return cos[row, :, pair].transpose(1, 2), sin[row, :, pair].transpose(1, 2)


def _norm(x: Tensor, norm: str | None, eps: float) -> Tensor:
    if norm is None:
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    dims = (-2, -1) if norm == "rms_full" else (-1,)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def _rotate(
    u: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: str,
    axes: tuple[int, ...],
    rounded: Callable[..., Tensor],
) -> Tensor:
    first, second = pair_columns(pairing, axes)
    a, b = u[..., first], u[..., second]
    cos, sin = rounded(cos, "rope"), rounded(sin, "rope")
    ya = rounded(a * cos, "rope") - rounded(b * sin, "rope")
    yb = rounded(b * cos, "rope") + rounded(a * sin, "rope")
    y = torch.cat([ya, yb, u[..., sum(axes) :]], -1)
    # y is ordered (all a, all b, rest): put every component back where it came from
    order = torch.tensor(first + second + list(range(sum(axes), u.shape[-1])), device=u.device)
    return y[..., torch.argsort(order)]


def _one(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    axes: tuple[int, ...],
    norm: str | None,
    eps: float,
    pairing: str,
    points: Collection[str],
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    def rounded(t: Tensor, *names: str) -> Tensor:
        if not any(name in points for name in names):
            return t
        return t + (t.detach().to(x.dtype).to(compute) - t.detach())  # the difference is exact

    u = x.to(compute)
    if norm is not None:
        u = rounded(_norm(u, norm, eps), "xhat")
        if weight is not None:
            w = weight.to(compute)
            u = u * (w.view(x.shape[-2:]) if norm == "rms_full" else w)
        if bias is not None:
            u = u + bias.to(compute)
        u = rounded(u, "affine")
    if tables is not None:
        u = rounded(u, "pre_rope")
        cos, sin = (t.to(compute) for t in tables)
        if x.ndim == 4 and cos.shape[0] == x.shape[0] * x.shape[1]:
            cos, sin = (t.unflatten(0, x.shape[:2]) for t in (cos, sin))
        u = _rotate(u, cos, sin, pairing, axes, rounded)
    return u.to(x.dtype)


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    position_index: Tensor | None = None,
    axes: tuple[int, ...] = (),
    *,
    norm: str | None = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    points: Collection[str] = (),
) -> tuple[Tensor, Tensor]:
    """Differentiable definition. q ``[N, Hq, D]`` or ``[B, L, Hq, D]``, k alike; any float dtype.

    cos and sin are ``[P, r/2]`` (or ``[P, H, r/2]``, one table per head), position_index is
    ``[N or L, A]``, and ``points`` names the rounding points of the law besides the final one.
    """
    tables = None
    if cos is not None:
        assert sin is not None and position_index is not None
        tables = expand_tables(cos, sin, position_index, axes)
    yq = _one(q, q_weight, q_bias, tables, axes, norm, eps, pairing, points)
    yk = _one(k, k_weight, k_bias, tables, axes, norm, eps, pairing, points)
    return yq.contiguous(), yk.contiguous()
