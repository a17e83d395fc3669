"""Attention in tile windows as an op of torch, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, backend, packed_attention
from sora_kernels.ops.packed_attention import prepare_window
from tests.helpers import randn
from tests.ops.windowed import GIVEN, IMAGE, VIDEO, attention


@pytest.mark.parametrize("chosen", ["reference", "native"])
def test_only_asked_gradients_and_lse_alone(chosen: str) -> None:
    layout = PackedLayout([VIDEO], order="tile")
    q, k, v = randn(layout.num_tokens, 3, 1, 16).unbind(1)
    q = q.detach().requires_grad_()
    with backend.use_backend(chosen):
        lse = packed_attention(q, k, v, layout, window=(1, 3, 1), return_lse=True)[1]
    lse.sum().backward()
    exact_q = q.detach().double().requires_grad_()
    with backend.use_backend("reference"):
        exact = packed_attention(
            exact_q, k.double(), v.double(), layout, window=(1, 3, 1), return_lse=True
        )[1]
    exact.sum().backward()
    torch.testing.assert_close(q.grad, exact_q.grad.float(), atol=1e-5, rtol=1e-5)
    assert k.grad is None


@pytest.mark.parametrize("chosen", ["reference", "native"])
@pytest.mark.parametrize("parts", [[], [[]], [[Text(0)], []]])
def test_no_tokens(chosen: str, parts: list[Any]) -> None:
    layout = PackedLayout(parts, order="tile")
    q = torch.zeros(0, 2, 16, requires_grad=True)
    out, lse = attention(layout, (3, 3, 3), chosen)(q, q, q)
    out.sum().backward()
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    assert q.grad is not None


def test_expanded_gradient() -> None:
    layout = PackedLayout([VIDEO], order="tile")
    q, k, v = (x.detach().requires_grad_() for x in randn(layout.num_tokens, 3, 2, 16).unbind(1))
    packed_attention(q, k, v, layout, window=(1, 3, 1)).sum().backward()
    total = torch.full((2, 16), float(layout.num_tokens))
    torch.testing.assert_close(v.grad.sum(0), total)


def _raw(requires_grad: bool = False) -> tuple[Any, ...]:
    layout = PackedLayout([VIDEO, IMAGE], order="tile")
    qkv = randn(layout.num_tokens, 3, 2, 16).unbind(1)
    q, k, v = (x.detach().requires_grad_(requires_grad) for x in qkv)
    ints = list(Window((1, 3, 1)).as_ints())
    return q, k, v, layout.cu_seqlens.clone(), layout.window_table().clone(), None, ints, 0.25


def test_opcheck() -> None:
    ops = torch.ops.sora_kernels
    args = _raw()
    torch.library.opcheck(ops.windowed_attention_fwd.default, args)
    out, lse = ops.windowed_attention_fwd(*args)
    for dlse, needs in ((None, (True, True)), (torch.ones_like(lse), (True, False))):
        dout = randn(*out.shape, seed=1)
        bwd = (dout, dlse, *args[:3], out, lse, *args[3:5], None, None, *args[6:], *needs)
        torch.library.opcheck(ops.windowed_attention_bwd.default, bwd)


def test_raw_op_under_grad_raises() -> None:
    with pytest.raises(RuntimeError, match="windowed_attention_fwd has no gradient"):
        torch.ops.sora_kernels.windowed_attention_fwd(*_raw(requires_grad=True))


@pytest.mark.parametrize("window", [(1, 3, 3), Window((2, 3, None), causal=True, sink=1)])
def test_compiles_without_a_graph_break_and_without_recompiling_per_pack(window: Any) -> None:
    frames = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return packed_attention(q, k, v, layout, window=window) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for number, grid in enumerate(((2, 3, 5), (3, 5, 7), (4, 8, 2), (2, 9, 4), (7, 5, 5))):
        parts = [[Text(3 + number), Grid(*grid, tile=(1, 2, 2))]] + [[Text(3)]] * number
        layout = PackedLayout(parts, order="tile")
        q, k, v = (x.requires_grad_() for x in randn(3, layout.num_tokens, 2, 16).unbind(0))
        got, want = compiled(q, k, v, layout), attend(q, k, v, layout)
        assert torch.equal(got, want)
        dout = randn(*want.shape, seed=1)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), dout),
            torch.autograd.grad(want, (q, k, v), dout),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert frames <= 3


def test_a_compiled_region_finds_prepared_work_lists() -> None:
    """What the GPU path reads inside a graph; on the CPU there is nothing to prepare."""

    def read(x: Tensor, layout: PackedLayout) -> Tensor:
        return x + layout.window_work(16, Window.of((1, 3, 3)), "key").sum()

    torch._dynamo.reset()
    compiled = torch.compile(read, fullgraph=True, backend="eager")
    x = torch.zeros(())
    for parts in ([VIDEO], [VIDEO, GIVEN], [IMAGE, VIDEO]):
        layout = PackedLayout(parts, order="tile")
        want = read(x, layout)
        assert torch.equal(compiled(x, layout), want)
    fresh = PackedLayout([GIVEN], order="tile")
    with pytest.raises(Exception, match="(?s)prepare_window|exception"):
        compiled(x, fresh)
    prepare_window(fresh, (1, 3, 3), torch.empty(1, 16))
    assert not fresh._window_works
    with backend.use_backend("triton"):
        prepare_window(fresh, (1, 3, 3), torch.empty(1, 16))
        assert {side for _, _, side in fresh._window_works} == {"query", "key"}
        made = dict(fresh._window_works)
        q = randn(fresh.num_tokens, 1, 16).requires_grad_()
        packed_attention(q, q, q, fresh, window=(1, 3, 3))
        assert made.keys() == fresh._window_works.keys()
    with pytest.raises(ValueError, match="window: expected a layout"):
        prepare_window(PackedLayout([GIVEN]), (1, 3, 3), torch.empty(1, 16))


# --- bad input ----------------------------------------------------------------------------------

Q = torch.zeros(66, 2, 16)
IN_TILES = PackedLayout([[Text(2), Grid(4, 4, 4)]], order="tile")
LENGTHS = torch.tensor([0, 66], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, 'window: expected a layout with order="tile", got order="raster"',
         {"layout": PackedLayout([[Text(2), Grid(4, 4, 4)]])}),
        (ValueError, "window: expected at most one grid to be made in a segment",
         {"layout": PackedLayout([[Text(2), Grid(2, 4, 4), Grid(2, 4, 4)]], order="tile")}),
        (ValueError, "layout: expected a layout in tile order with a window, got None",
         {"layout": None}),
        (ValueError, "cu_seqlens: expected None with a window", {"cu_seqlens": LENGTHS}),
        (ValueError, "cu_seqlens: expected None with a window",
         {"cu_seqlens": LENGTHS, "layout": None}),
        (ValueError, "cu_seqlens_k: expected None with a window", {"cu_seqlens_k": LENGTHS}),
        (ValueError, "causal: expected False with a window", {"causal": True}),
        (ValueError, "layout: expected 66 tokens, got 64",
         {"layout": PackedLayout([[Grid(4, 4, 4)]], order="tile")}),
        (ValueError, "layout: expected the device of q",
         {"layout": PackedLayout([[Text(2), Grid(4, 4, 4)]], order="tile", device="meta")}),
        (ValueError, "k: expected the 66 tokens of q", {"k": Q[:4], "v": Q[:4]}),
        (ValueError, r"window\[1\]: expected an odd number", {"window": (3, 2, 3)}),
        (ValueError, "window: expected three sizes", {"window": 3}),
        (ValueError, "window: expected three sizes", {"window": (3, 3)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["eager", "fake", "compiled"])
def test_bad_input_is_named(
    path: str, error: type[Exception], match: str, kwargs: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": Q, "v": Q, "layout": IN_TILES, "window": (1, 3, 3)}
    arguments.update(kwargs)
    call: Any = packed_attention
    if path == "fake":
        if "meta" in str(arguments["layout"]):
            return  # there the layout is where q is
        arguments = {
            name: value.to("meta") if isinstance(value, (Tensor, PackedLayout)) else value
            for name, value in arguments.items()
        }
    if path == "compiled":
        torch._dynamo.reset()
        call = torch.compile(packed_attention, backend="eager")
    with pytest.raises(error, match=match):
        call(**arguments)


def test_fakes_have_the_shapes_of_the_results() -> None:
    layout = PackedLayout([VIDEO], order="tile", device="meta")
    q = torch.empty(layout.num_tokens, 4, 16, device="meta", requires_grad=True)
    k = torch.empty(layout.num_tokens, 2, 16, device="meta", requires_grad=True)
    out, lse = packed_attention(q, k, k, layout, window=(1, 3, 3), return_lse=True)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert lse.shape == (4, layout.num_tokens)
    assert lse.dtype == torch.float32
    assert k.grad.shape == k.shape
