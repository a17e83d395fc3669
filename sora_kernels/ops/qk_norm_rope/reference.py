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

from collections.abc import Callable, Collection, Sequence

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
    """Tokens ``[n, H, D]`` with tables ``[n, 1 or H, r/2]``."""
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
        u = _rotate(u, tables[0].to(compute), tables[1].to(compute), pairing, axes, rounded)
    return u.to(x.dtype)


Tables = tuple[Tensor, Tensor, Tensor]  # cos, sin, position_index


def qk_norm_rope_reference(
    x: Sequence[Tensor],
    weight: Sequence[Tensor] = (),
    bias: Sequence[Tensor] = (),
    index: Sequence[Tensor] = (),
    tokens: int = 0,
    tables: Tables | None = None,
    axes: tuple[int, ...] = (),
    *,
    norm: str | None = "rms",
    eps: float = 1e-6,
    pairing: str = "interleaved",
    points: Collection[str] = (),
) -> Tensor:
    """Differentiable definition of one side (q or k); any float dtype.

    ``x`` is one tensor ``[N, H, D]`` or ``[B, L, H, D]``, or one for each stream. ``index[s]``
    lists the packed rows of the tokens of stream s, which ``weight[s]`` and ``bias[s]`` norm: of a
    single ``x``, those rows are its own; of several, they are where its tokens go in the result
    ``[tokens, H, D]``. Packed row n turns by row ``position_index[n % len(position_index)]`` of
    the tables ``[P, r/2]`` (``[P, H, r/2]``: one for each head). ``points`` names the rounding
    points of the law besides the final one.
    """
    flat = [t.flatten(0, -3) for t in x]
    shape = x[0].shape
    if not index:
        flat_index = [torch.arange(flat[0].shape[0], device=flat[0].device)]
    else:
        flat_index = [rows.long() for rows in index]
        if len(x) == 1:
            flat = [flat[0][rows] for rows in flat_index]
        else:
            shape = torch.Size((tokens, *shape[-2:]))
    results = []
    for s, (part, rows) in enumerate(zip(flat, flat_index, strict=True)):
        angles = None
        if tables is not None:
            cos, sin, position_index = tables
            angles = expand_tables(cos, sin, position_index[rows % len(position_index)], axes)
        w, b = (group[s] if group else None for group in (weight, bias))
        results.append(_one(part, w, b, angles, axes, norm, eps, pairing, points))
    if not index:
        return results[0].contiguous().view(shape)
    source = torch.argsort(torch.cat(flat_index))  # of each packed row
    return torch.cat(results)[source].view(shape)
