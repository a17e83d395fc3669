"""adaln_attention and adaln_mlp: the halves of a block, against the ops one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sora_kernels import (
    Grid,
    PackedLayout,
    Text,
    adaln_attention,
    adaln_mlp,
    bias_gelu,
    gate_residual,
    norm_modulate,
    packed_attention,
    qk_norm_rope,
)
from tests.helpers import randn

WIDTH, HEADS, HIDDEN = 48, 2, 80
LAYOUT = PackedLayout([[Text(3), Grid(2, 3, 4)], [Grid(1, 3, 3)], [Text(0), Grid(1, 2, 2)]])
ROPE = LAYOUT.rope((8, 8, 8))
N, R = LAYOUT.num_tokens, LAYOUT.num_segments


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {
        "qkv": (3 * WIDTH, WIDTH), "qkv_bias": (3 * WIDTH,), "out": (WIDTH, WIDTH),
        "up": (HIDDEN, WIDTH), "up_bias": (HIDDEN,), "down": (WIDTH, HIDDEN),
        "q": (WIDTH // HEADS,), "k": (WIDTH // HEADS,), "mods": (R, 8 * WIDTH), "x": (N, WIDTH),
    }  # fmt: skip
    return {
        name: (randn(*shape, dtype=dtype, seed=i) * (0.2 if len(shape) == 2 else 1.0))
        .detach()
        .requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


def linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda h: nn.functional.linear(h, weight, bias)


def one_by_one(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    rows: Any = {"rows": LAYOUT.segment_rows}
    s1, c1, g1, s2, c2, g2, s3, c3 = p["mods"].chunk(8, -1)
    h: Any = norm_modulate(p["x"], s1, c1, **rows)
    qkv = linear(p["qkv"], p["qkv_bias"])(h)
    q, k, v = qkv.view(N, 3, HEADS, -1).unbind(1)
    q, k = qk_norm_rope(q, k, p["q"], p["k"], ROPE)
    y = linear(p["out"])(packed_attention(q, k, v, LAYOUT).flatten(1))
    x: Any = gate_residual(p["x"], y, g1, **rows)
    h = norm_modulate(x, s2, c2, **rows)
    x = gate_residual(x, linear(p["down"])(bias_gelu(linear(p["up"])(h), p["up_bias"])), g2, **rows)
    h = norm_modulate(x, s3, c3, **rows)
    return x, h


def halves(p: dict[str, Tensor], recompute: bool, chained: bool) -> tuple[Tensor, ...]:
    rows: Any = {"rows": LAYOUT.segment_rows}
    s1, c1, g1, s2, c2, g2, s3, c3 = p["mods"].chunk(8, -1)
    first = partial(
        adaln_attention, p["x"], (s1, c1, g1), linear(p["qkv"], p["qkv_bias"]), linear(p["out"]),
        LAYOUT, ROPE, heads=HEADS, q_weight=p["q"], k_weight=p["k"], recompute=recompute, **rows,
    )  # fmt: skip
    second = partial(
        adaln_mlp, up=linear(p["up"]), down=linear(p["down"]),
        activation=partial(bias_gelu, bias=p["up_bias"]), recompute=recompute, **rows,
    )  # fmt: skip
    if chained:
        x, h = first(next_modulation=(s2, c2))
        x, h = second(x, (s2, c2, g2), normed=h, next_modulation=(s3, c3))
        return x, h
    x = second(first(), (s2, c2, g2))
    return x, norm_modulate(x, s3, c3, **rows)


def results(call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], dtype: torch.dtype) -> Any:
    p = parameters(dtype)
    outputs = call(p)
    upstream = [randn(*y.shape, dtype=dtype, seed=40 + i) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, list(p.values()), upstream)]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chained", [True, False])
def test_equals_the_ops_one_by_one(chained: bool, recompute: bool) -> None:
    got = results(lambda p: halves(p, recompute, chained), torch.float32)
    expected = results(one_by_one, torch.float32)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_recomputing_changes_no_bit() -> None:
    kept = results(lambda p: halves(p, False, True), torch.bfloat16)
    again = results(lambda p: halves(p, True, True), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def kept_bytes(recompute: bool) -> int:
    """Bytes that autograd keeps, parameters and inputs apart; and hooks around ours still work."""
    p = parameters(torch.float32)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor.clone()

    given = {t.untyped_storage().data_ptr() for t in p.values()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        x, h = halves(p, recompute, True)
    assert given & set(kept)
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in given)
    (x.sum() + h.square().sum()).backward()
    return found


def test_keeps_less() -> None:
    """The two modulated norms, the rotated q and k, and the activation are gone."""
    assert kept_bytes(False) - kept_bytes(True) == N * 4 * (4 * WIDTH + HIDDEN)


def test_backward_twice() -> None:
    p = parameters(torch.float32)
    x, h = halves(p, True, True)
    loss = x.square().sum() + h.square().sum()
    first = torch.autograd.grad(loss, list(p.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(p.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_what_is_recomputed_from_is_an_error() -> None:
    p = parameters(torch.float32)
    x, h = halves(p, True, True)
    with torch.no_grad():
        p["x"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x.sum() + h.sum()).backward()


def test_no_grad_and_frozen_projections() -> None:
    p = parameters(torch.float32)
    with torch.no_grad():
        x, _ = halves(p, True, True)
    assert not x.requires_grad
    for name in ("qkv", "qkv_bias", "out", "up", "up_bias", "down"):
        p[name].requires_grad_(False)
    x, h = halves(p, True, True)
    (dx,) = torch.autograd.grad(x.sum() + h.square().sum(), [p["x"]])
    assert torch.isfinite(dx).all()


def test_compiles_as_one_graph() -> None:
    p = parameters(torch.float32)
    call = torch.compile(lambda p: halves(p, True, True), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(call(p), halves(p, True, True), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_projection() -> None:
    p = parameters(torch.float32)
    with pytest.raises(ValueError, match="qkv: expected a width of 3 x 2 heads, got 80"):
        adaln_attention(
            p["x"], (None, None, None), linear(p["up"]), linear(p["out"]), LAYOUT, heads=HEADS
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_autocast(recompute: bool) -> None:
    """Under autocast the stream stays fp32 and projections give bf16: the ops take the mix, and
    gradients come back in the dtype of their parameters."""
    p = parameters(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x, h = halves(p, recompute, True)
    assert x.dtype == torch.float32
    upstream = [randn(*y.shape, seed=40 + i).to(y.dtype) for i, y in enumerate((x, h))]
    grads = torch.autograd.grad([x, h], list(p.values()), upstream)
    assert {g.dtype for g in grads} == {torch.float32}
    expected = results(one_by_one, torch.float32)
    for mine, exact in zip((x, h, *grads), expected, strict=True):
        error = (mine.float() - exact).norm() / exact.norm()
        assert error < 0.03, f"relative error {error:.3f}"
