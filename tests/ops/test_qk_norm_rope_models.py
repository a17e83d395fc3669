"""qk_norm_rope against the formula of each published model, written out in plain PyTorch.

Every row computes its own positions, frequencies, pairing and norm, in fp64 for the oracle and in
fp32 for the allowance; forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Rope, Text, qk_norm_rope, use_backend
from tests.helpers import check, randn

T, H, W = 2, 3, 2  # tokens of the video
HEADS = 2


def positions() -> Tensor:
    """(t, h, w) of every token in raster order, ``[12, 3]``."""
    axes = torch.meshgrid(*(torch.arange(n) for n in (T, H, W)), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3).double()


def frequencies(size: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def axis_angles(axes: tuple[int, ...], theta: tuple[float, float, float]) -> Tensor:
    """Angles of every pair, axis after axis, ``[12, r/2]``."""
    columns = [positions()[:, a, None] * frequencies(axes[a], theta[a]) for a in range(3)]
    return torch.cat(columns, -1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def turn_interleaved(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs as complex numbers; angles ``[N, 1 or H, D/2]``."""
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def turn_half(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
    return x * cos + rotate_half(x) * sin


def layout_rope(*parts: Any, axes: tuple[int, int, int], **options: Any) -> Rope:
    return PackedLayout([list(parts)]).rope(axes, **options)


VIDEO = Grid(T, H, W)
Plain = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def wan() -> tuple[Plain, dict[str, Any]]:
    """RMSNorm over the whole inner dimension, then complex rotation of 44/42/42."""
    angles = axis_angles((44, 42, 42), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x.flatten(1), weight, 1e-6).view(x.shape), angles)

    return plain, {"width": 128, "norm": "rms_full", "rope": layout_rope(VIDEO, axes=(44, 42, 42))}


def hunyuan_video() -> tuple[Plain, dict[str, Any]]:
    """RMSNorm per head; the image is rotated (theta 256), the text behind it is not."""
    angles = axis_angles((16, 56, 56), (256.0,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        normed = rms(x, weight, 1e-6)
        return torch.cat((turn_interleaved(normed[:12], angles), normed[12:]))

    rope = layout_rope(VIDEO, Text(3), axes=(16, 56, 56), theta=256.0)
    return plain, {"width": 128, "norm": "rms", "rope": rope, "tokens": 15}


def cogvideox() -> tuple[Plain, dict[str, Any]]:
    """LayerNorm per head, text first and unrotated, 16/24/24."""
    angles = axis_angles((16, 24, 24), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
        return torch.cat((normed[:3], turn_interleaved(normed[3:], angles)))

    rope = layout_rope(Text(3), VIDEO, axes=(16, 24, 24))
    return plain, {"width": 64, "norm": "layer", "rope": rope, "tokens": 15}


def cosmos() -> tuple[Plain, dict[str, Any]]:
    """Halves of the whole head (NeoX), with NTK scaling of the time axis."""
    axes = (44, 42, 42)
    angles = axis_angles(axes, (1e4 * 2.0 ** (44 / 42), 1e4, 1e4))[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_half(rms(x, weight, 1e-6), angles)

    rope = layout_rope(VIDEO, axes=axes, ntk=(2.0, 1.0, 1.0))
    return plain, {"width": 128, "norm": "rms", "rope": rope, "pairing": "half"}


def open_sora_plan() -> tuple[Plain, dict[str, Any]]:
    """No norm; each axis owns a third of the head and turns the halves of that third."""
    angles = axis_angles((32, 32, 32), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        thirds = zip(x.chunk(3, -1), angles.chunk(3, -1), strict=True)
        return torch.cat([turn_half(part, angle) for part, angle in thirds], -1)

    rope = layout_rope(VIDEO, axes=(32, 32, 32))
    return plain, {"width": 96, "norm": None, "rope": rope, "pairing": "half_per_axis"}


def minimax_h3() -> tuple[Plain, dict[str, Any]]:
    """96 of 128 components rotated (NeoX), the rest only normalised; eps 1e-5."""
    angles = axis_angles((32, 32, 32), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        normed = rms(x, weight, 1e-5)
        return torch.cat((turn_half(normed[..., :96], angles), normed[..., 96:]), -1)

    rope = layout_rope(VIDEO, axes=(32, 32, 32))
    options = {"norm": "rms", "eps": 1e-5, "pairing": "half"}
    return plain, {"width": 128, "rope": rope, **options}


def mochi() -> tuple[Plain, dict[str, Any]]:
    """Learned frequencies [3, heads, D/2]: every head has angles of its own; eps 1e-5."""
    learned = randn(3, HEADS, 64, seed=40).double()
    angles = torch.einsum("na,ahf->nhf", positions(), learned)

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x, weight, 1e-5), angles)

    index = torch.arange(12, dtype=torch.int32)[:, None]
    rope = Rope(angles.cos().float(), angles.sin().float(), index, (128,))
    return plain, {"width": 128, "norm": "rms", "rope": rope, "eps": 1e-5}


def ltx_video() -> tuple[Plain, dict[str, Any]]:
    """Rotation of the inner dimension before it is split into heads: fractional coordinates,
    frequency-major angles, and inner % 6 components at the front that do not turn; eps 1e-5."""
    inner = HEADS * 64
    scales = 1e4 ** torch.linspace(0, 1, inner // 6, dtype=torch.float64) * math.pi / 2
    fractions = positions() / torch.tensor([T, H, W]) * 2 - 1
    turning = (fractions[:, None, :] * scales[:, None]).flatten(1)  # [12, inner // 2 - 1]
    still = torch.zeros(12, inner % 6 // 2, dtype=torch.float64)
    angles = torch.cat((still, turning), 1)

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x.flatten(1), weight, 1e-5), angles).view(x.shape)

    per_head = angles.view(12, HEADS, 32)
    index = torch.arange(12, dtype=torch.int32)[:, None]
    rope = Rope(per_head.cos().float(), per_head.sin().float(), index, (64,))
    return plain, {"width": 64, "norm": "rms_full", "rope": rope, "eps": 1e-5}


ROWS = (wan, hunyuan_video, cogvideox, cosmos, open_sora_plan, minimax_h3, mochi, ltx_video)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_model(backend: str, row: Callable[[], tuple[Plain, dict[str, Any]]]) -> None:
    plain, options = row()
    width, tokens = options.pop("width"), options.pop("tokens", 12)
    norm = options["norm"]
    size = width * (HEADS if norm == "rms_full" else 1)
    sides = []
    for s in range(2):
        tensors = [randn(tokens, 3, HEADS, width, seed=s)[:, s]]  # as in one packed projection
        tensors += [randn(size, seed=10 + s)] if norm else []
        tensors += [randn(size, seed=20 + s)] if norm == "layer" else []
        sides.append(tensors)
    upstream = [randn(tokens, HEADS, width, seed=30 + s) for s in range(2)]

    def formula(dtype: torch.dtype) -> list[Tensor]:
        results = []
        for tensors, dy in zip(sides, upstream, strict=True):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            padded = [*leaves, None, None][:3]
            y = plain(*padded)  # type: ignore[arg-type]
            results += [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
        return results

    leaves = [[t.detach().requires_grad_() for t in tensors] for tensors in sides]
    named = {
        f"{side}{name}": t
        for side, tensors in zip("qk", leaves, strict=True)
        for name, t in zip(("", "_weight", "_bias"), tensors, strict=False)
    }
    with use_backend(backend):
        outputs = qk_norm_rope(**named, **options)
        got = []
        for y, tensors, dy in zip(outputs, leaves, upstream, strict=True):
            got += [y.detach(), *torch.autograd.grad(y, tensors, dy, retain_graph=True)]
    exact, lowp = formula(torch.float64), formula(torch.float32)
    per_side = len(got) // 2
    for i, (mine, oracle, plain32) in enumerate(zip(got, exact, lowp, strict=True)):
        # fp32 tables round the angle's cos and sin once; the complex formula in fp64 does not
        spacing = 4.0 if i % per_side == 0 else 8.0
        check(mine, oracle, plain32, grad=i % per_side > 0, extra_ulp=spacing, name=str(i))
