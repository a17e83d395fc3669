"""The rotary and q/k-norm conventions of published models, each written out in plain PyTorch.

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
Row = tuple[Plain | tuple[Plain, Plain], dict[str, Any]]  # one formula, or those of q and of k


def wan() -> Row:
    """RMSNorm over the whole inner dimension, then complex rotation of 44/42/42."""
    angles = axis_angles((44, 42, 42), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x.flatten(1), weight, 1e-6).view(x.shape), angles)

    return plain, {"width": 128, "norm": "rms_full", "rope": layout_rope(VIDEO, axes=(44, 42, 42))}


def hunyuan_video() -> Row:
    """RMSNorm per head; the image is rotated (theta 256), the text behind it is not."""
    angles = axis_angles((16, 56, 56), (256.0,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        normed = rms(x, weight, 1e-6)
        return torch.cat((turn_interleaved(normed[:12], angles), normed[12:]))

    rope = layout_rope(VIDEO, Text(3), axes=(16, 56, 56), theta=256.0)
    return plain, {"width": 128, "norm": "rms", "rope": rope, "tokens": 15}


def cogvideox() -> Row:
    """LayerNorm per head, text first and unrotated, 16/24/24."""
    angles = axis_angles((16, 24, 24), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
        return torch.cat((normed[:3], turn_interleaved(normed[3:], angles)))

    rope = layout_rope(Text(3), VIDEO, axes=(16, 24, 24))
    return plain, {"width": 64, "norm": "layer", "rope": rope, "tokens": 15}


def cosmos() -> Row:
    """Halves of the whole head (NeoX), with NTK scaling of the time axis."""
    axes = (44, 42, 42)
    angles = axis_angles(axes, (1e4 * 2.0 ** (44 / 42), 1e4, 1e4))[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_half(rms(x, weight, 1e-6), angles)

    rope = layout_rope(VIDEO, axes=axes, ntk=(2.0, 1.0, 1.0))
    return plain, {"width": 128, "norm": "rms", "rope": rope, "pairing": "half"}


def open_sora_plan() -> Row:
    """No norm; each axis owns a third of the head and turns the halves of that third."""
    angles = axis_angles((32, 32, 32), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        thirds = zip(x.chunk(3, -1), angles.chunk(3, -1), strict=True)
        return torch.cat([turn_half(part, angle) for part, angle in thirds], -1)

    rope = layout_rope(VIDEO, axes=(32, 32, 32))
    return plain, {"width": 96, "norm": None, "rope": rope, "pairing": "half_per_axis"}


def minimax_h3() -> Row:
    """96 of 128 components rotated (NeoX), the rest only normalised; eps 1e-5."""
    angles = axis_angles((32, 32, 32), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        normed = rms(x, weight, 1e-5)
        return torch.cat((turn_half(normed[..., :96], angles), normed[..., 96:]), -1)

    rope = layout_rope(VIDEO, axes=(32, 32, 32))
    options = {"norm": "rms", "eps": 1e-5, "pairing": "half"}
    return plain, {"width": 128, "rope": rope, **options}


def mochi() -> Row:
    """Learned frequencies [3, heads, D/2]: every head has angles of its own; eps 1e-5."""
    learned = randn(3, HEADS, 64, seed=40).double()
    angles = torch.einsum("na,ahf->nhf", positions(), learned)

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x, weight, 1e-5), angles)

    index = torch.arange(12, dtype=torch.int32)[:, None]
    rope = Rope(angles.cos().float(), angles.sin().float(), index, (128,))
    return plain, {"width": 128, "norm": "rms", "rope": rope, "eps": 1e-5}


def ltx_video() -> Row:
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


def flux() -> Row:
    """16/56/56; ids of the text are 0, so it stands first and is not turned."""
    angles = axis_angles((16, 56, 56), (1e4,) * 3)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        normed = rms(x, weight, 1e-6)
        return torch.cat((normed[:3], turn_interleaved(normed[3:], angles)))

    rope = layout_rope(VIDEO, axes=(16, 56, 56)).padded(before=3)
    return plain, {"width": 128, "norm": "rms", "rope": rope, "tokens": 15}


def qwen_image() -> Row:
    """Rows and columns centred (scale_rope), text behind the image on the diagonal."""
    axes = (16, 56, 56)
    image = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (1, 4, 2)), indexing="ij"), -1)
    image = image.reshape(-1, 3).double() - torch.tensor([0, 2, 1])
    text = (2 + torch.arange(4.0, dtype=torch.float64))[:, None].expand(4, 3)
    where = torch.cat((image, text))
    columns = [where[:, a, None] * frequencies(axes[a], 1e4) for a in range(3)]
    angles = torch.cat(columns, -1)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x, weight, 1e-6), angles)

    # A diagonal is a row of grids of one token, each with its own origin.
    diagonal = [Grid(1, 1, 1, origin=(2.0 + i,) * 3) for i in range(4)]
    rope = layout_rope(Grid(1, 4, 2, origin=(0, -2, -1)), *diagonal, axes=axes)
    return plain, {"width": 128, "norm": "rms", "rope": rope}


def open_sora_2_liger() -> Row:
    """Halves of the head after Liger's permutation of the weights: the interleaved rotation."""
    angles = axis_angles((16, 56, 56), (1e4,) * 3)[:, None]
    permuted = torch.cat((torch.arange(0, 128, 2), torch.arange(1, 128, 2)))

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        straight = torch.argsort(permuted)
        turned = turn_interleaved(rms(x, weight, 1e-6)[..., straight], angles)
        return turned[..., permuted]

    rope = layout_rope(VIDEO, axes=(16, 56, 56))
    return plain, {"width": 128, "norm": "rms", "rope": rope, "pairing": "half"}


def open_sora_1_2() -> Row:
    """The temporal blocks: one axis over the whole head."""
    angles = positions()[:, :1] * frequencies(72, 1e4)

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x, weight, 1e-6), angles[:, None])

    return plain, {"width": 72, "norm": "rms", "rope": layout_rope(VIDEO, axes=(72, 0, 0))}


def z_image() -> Row:
    """32/48/48, theta 256; text counts 1, 2, 3 along time, the image follows it; eps 1e-5."""
    where = torch.zeros(15, 3, dtype=torch.float64)
    where[:3, 0] = torch.arange(1, 4)
    where[3:] = positions() + torch.tensor([4, 0, 0])
    columns = [where[:, a, None] * frequencies(n, 256.0) for a, n in enumerate((32, 48, 48))]
    angles = torch.cat(columns, -1)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return turn_interleaved(rms(x, weight, 1e-5), angles)

    text, image = Grid(3, 1, 1, origin=(1, 0, 0)), Grid(T, H, W, origin=(4, 0, 0))
    rope = layout_rope(text, image, axes=(32, 48, 48), theta=256.0)
    return plain, {"width": 128, "norm": "rms", "rope": rope, "tokens": 15, "eps": 1e-5}


def allegro() -> Row:
    """Thirds, halves per axis, positions divided per axis."""
    divisor = torch.tensor([2.0, 1.5, 3.0], dtype=torch.float64)
    where = positions() / divisor
    columns = [where[:, a, None] * frequencies(32, 1e4) for a in range(3)]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        thirds = zip(x.chunk(3, -1), columns, strict=True)
        return torch.cat([turn_half(part, angle[:, None]) for part, angle in thirds], -1)

    rope = layout_rope(VIDEO, axes=(32, 32, 32), interpolation=(2.0, 1.5, 3.0))
    return plain, {"width": 96, "norm": None, "rope": rope, "pairing": "half_per_axis"}


def linspace_crop_and_fps() -> Row:
    """CogVideoX 1.0 spaces a crop evenly; Cosmos counts time in frames of 24 per second."""
    axes, crop = (16, 24, 24), ((1.0, 4.0), (2.0, 3.0))
    t = torch.arange(T, dtype=torch.float64) * 24 / 30
    h = torch.linspace(*crop[0], H + 1, dtype=torch.float64)[:-1]  # endpoint=False
    w = torch.linspace(*crop[1], W + 1, dtype=torch.float64)[:-1]
    where = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), -1).reshape(-1, 3)
    columns = [where[:, a, None] * frequencies(axes[a], 1e4) for a in range(3)]
    angles = torch.cat(columns, -1)[:, None]

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
        return turn_interleaved(normed, angles)

    grid = Grid(T, H, W, origin=(0, 1, 2), scale=(24 / 30, 3 / H, 1 / W))
    return plain, {"width": 64, "norm": "layer", "rope": layout_rope(grid, axes=axes)}


def ltx_2() -> Row:
    """The split rotation: halves of a head, cos and sin [B, H, T, r/2]; k has tables of its own."""
    tables = [randn(1, HEADS, 12, 32, seed=50 + s).double() for s in range(2)]

    def side(s: int) -> Plain:
        angles = tables[s][0].transpose(0, 1)  # [T, H, r/2]

        def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert weight is not None
            return turn_half(rms(x.flatten(1), weight, 1e-6).view(x.shape), angles)

        return plain

    ropes = [Rope.from_tables(t.cos().transpose(1, 2), t.sin().transpose(1, 2), per_head=True)
             for t in tables]  # fmt: skip
    options = {"rope": ropes[0], "k_rope": ropes[1], "pairing": "half"}
    return (side(0), side(1)), {"width": 64, "norm": "rms_full", **options}


ROWS = (
    wan, hunyuan_video, cogvideox, cosmos, open_sora_plan, minimax_h3, mochi, ltx_video, flux,
    qwen_image, open_sora_2_liger, open_sora_1_2, z_image, allegro, linspace_crop_and_fps, ltx_2,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_model(backend: str, row: Callable[[], Row]) -> None:
    plain, options = row()
    formulas = plain if isinstance(plain, tuple) else (plain, plain)
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
        for tensors, dy, plain in zip(sides, upstream, formulas, strict=True):
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


# --- rounding in bf16 ---------------------------------------------------------------------------


def bf16_expression(norm: str | None, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm as torch computes it in bf16, one rounding after its affine part."""
    if norm == "rms_full":
        return F.rms_norm(x.flatten(1), weight.shape, weight, 1e-6).view(x.shape)
    if norm == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)
    return F.rms_norm(x, weight.shape, weight, 1e-6) if norm else x


@pytest.mark.parametrize(
    ("norm", "pairing"),
    [
        ("rms_full", "interleaved"),  # Wan, LTX-Video
        ("rms", "interleaved"),  # HunyuanVideo, Flux, Qwen-Image, Mochi, Z-Image
        ("layer", "interleaved"),  # CogVideoX
        ("rms", "half"),  # Cosmos, Open-Sora 2 through Liger
        (None, "half_per_axis"),  # Allegro, Open-Sora-Plan
    ],
)
def test_bf16_is_bit_equal_to_torch_norm_and_fp32_rotation(norm: str | None, pairing: str) -> None:
    """At least 99.9% of the outputs."""
    tokens, heads, axes = 96, 8, (24, 36, 36)
    rope = PackedLayout([[Grid(4, 4, 6)]]).rope(axes)
    x = randn(tokens, heads, 96, seed=1).bfloat16()
    weight = randn(96 * (heads if norm == "rms_full" else 1), seed=2).bfloat16()
    bias = randn(96, seed=3).bfloat16()
    cos, sin = (t[:, None] for t in rope.dense())
    u = bf16_expression(norm, x, weight, bias).float()
    pieces = u.split(axes, -1) if pairing == "half_per_axis" else (u,)
    spans = [size // 2 for size in axes] if pairing == "half_per_axis" else [48]
    turned = []
    for part, c, s in zip(pieces, cos.split(spans, -1), sin.split(spans, -1), strict=True):
        if pairing == "interleaved":
            a, b = part.unflatten(-1, (-1, 2)).unbind(-1)
            turned.append(torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2))
        else:
            a, b = part.chunk(2, -1)
            turned.append(torch.cat((a * c - b * s, b * c + a * s), -1))
    expected = torch.cat(turned, -1).bfloat16()
    weights = {"q_weight": weight, "k_weight": weight} if norm else {}
    biases = {"q_bias": bias, "k_bias": bias} if norm == "layer" else {}
    with use_backend("native"):
        got, _ = qk_norm_rope(
            x, x, **weights, **biases, rope=rope, norm=norm, pairing=pairing, law="torch"
        )
    equal = (got == expected).float().mean().item()
    assert equal >= 0.999, f"{equal:.4%} bit-equal"


# --- angles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [0.0, 100_000.0])
def test_angles_far_out_cost_no_more_than_the_rounding_of_cos_and_sin(origin: float) -> None:
    """A rotation of unit pairs is off by the fp32 roundings of the table and of its own products,
    at position 100,000 as at 0, where an angle computed in fp32 is off by 5e-3."""
    rope = layout_rope(Grid(9, 1, 1, origin=(origin, 0, 0)), axes=(64, 0, 0))
    x = torch.zeros(9, 1, 64)
    x[..., ::2] = 1
    with use_backend("native"):
        got, _ = qk_norm_rope(x, x, rope=rope, norm=None)
    angles = (origin + torch.arange(9, dtype=torch.float64))[:, None] * frequencies(64, 1e4)
    exact = torch.stack((angles.cos(), angles.sin()), -1).flatten(1)[:, None]
    assert (got.double() - exact).abs().max() <= 2.0**-24
    single = (origin + torch.arange(9.0))[:, None] * frequencies(64, 1e4).float()
    if origin:
        assert (single.cos().double() - angles.cos()).abs().max() > 1e-3


def test_minimax_h3_rotates_in_bf16() -> None:
    """cos and sin are cast to bf16 first, and every product rounds; 96 of 128 components turn."""
    rope = PackedLayout([[Grid(4, 4, 6)]]).rope((32, 32, 32))
    x = randn(96, 8, 128, seed=1).bfloat16()
    weight = randn(128, seed=2).bfloat16()
    cos, sin = (torch.cat((t, t), -1)[:, None].bfloat16() for t in rope.dense())
    u = F.rms_norm(x, (128,), weight, 1e-5)
    turned = u[..., :96] * cos + rotate_half(u[..., :96]) * sin
    expected = torch.cat((turned, u[..., 96:]), -1)
    law = ("affine", "pre_rope", "rope")
    with use_backend("native"):
        got, _ = qk_norm_rope(x, x, weight, weight, rope, eps=1e-5, pairing="half", law=law)
    equal = (got == expected).float().mean().item()
    assert equal >= 0.999, f"{equal:.4%} bit-equal"
