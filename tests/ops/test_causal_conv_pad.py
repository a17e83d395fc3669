"""causal_conv_pad: bit for bit the PyTorch expression, in chunks or in one; and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sora_kernels import causal_conv_pad, use_backend
from tests.helpers import check, far_apart, poisoned, randn

BACKENDS = ("native", "triton")
LAST = torch.channels_last_3d
FIRST = torch.contiguous_format


def clip(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 1) -> Any:
    x = randn(*shape, dtype=dtype, seed=seed)
    return x.contiguous(memory_format=LAST if last else FIRST)


def plain(
    x: Tensor, cache: Tensor | None, pad_t: int, pad_h: int, pad_w: int, mode_t: str = "replicate"
) -> Tensor:
    """What models write: repeat or zero, cat, pad."""
    whole = x if cache is None else torch.cat([cache, x], 2)
    missing = pad_t + x.shape[2] - whole.shape[2]
    if mode_t == "replicate":
        whole = torch.cat([whole[:, :, :1].repeat(1, 1, missing, 1, 1), whole], 2)
        missing = 0
    return F.pad(whole, (pad_w, pad_w, pad_h, pad_h, missing, 0))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode_t", ["replicate", "zeros"])
@pytest.mark.parametrize("cached", [0, 1, 2])
def test_bit_equal_to_the_expression(
    backend: str, dtype: torch.dtype, last: bool, mode_t: str, cached: int
) -> None:
    x = clip(2, 3, 3, 4, 5, dtype=dtype, last=last)
    cache = clip(2, 3, cached, 4, 5, dtype=dtype, last=last, seed=2) if cached else None
    with use_backend(backend), poisoned():
        padded, kept = causal_conv_pad(x, cache, pad_t=2, pad_h=1, pad_w=1, mode_t=mode_t)
    want = plain(x, cache, 2, 1, 1, mode_t)
    assert torch.equal(padded, want)
    assert torch.equal(kept, want[:, :, -2:, 1:-1, 1:-1])
    for result in (padded, kept):
        assert result.is_contiguous(memory_format=LAST if last else FIRST)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3, 63, 96, 384])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pads", [(2, 0, 0), (2, 1, 1), (0, 0, 0), (4, 0, 2), (1, 3, 0)])
def test_shapes_and_pads(
    backend: str, channels: int, last: bool, pads: tuple[int, int, int]
) -> None:
    pad_t, pad_h, pad_w = pads
    x = clip(1, channels, 1 if channels == 63 else 2, 3, 2, last=last)
    with use_backend(backend), poisoned():
        padded, kept = causal_conv_pad(x, pad_t=pad_t, pad_h=pad_h, pad_w=pad_w)
    assert torch.equal(padded, plain(x, None, pad_t, pad_h, pad_w))
    assert torch.equal(kept, plain(x, None, pad_t, 0, 0)[:, :, x.shape[2] :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [0, 1, 3, 5])
def test_uneven_pads_and_other_cache_lengths(backend: str, keep: int) -> None:
    x = clip(1, 4, 3, 5, 4, last=True)
    with use_backend(backend), poisoned():
        padded, kept = causal_conv_pad(x, pad_t=2, pad_h=(0, 1), pad_w=(2, 0), cache_len=keep)
    time = torch.cat([x[:, :, :1], x[:, :, :1], x], 2)
    assert torch.equal(padded, F.pad(time, (2, 0, 0, 1)))
    assert torch.equal(kept, time[:, :, 5 - keep :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [FIRST, LAST])
def test_any_strides_in_and_the_asked_layout_out(
    backend: str, memory_format: torch.memory_format
) -> None:
    base = clip(2, 8, 7, 6, 10, last=True)
    views = {
        "time": base[:, :, 1:4],
        "rows": base[:, :, :3, 1:5],
        "columns": base[:, :, :3, :, 1:9],
        "strided columns": base[:, :, :3, :, ::2],
        "channels": base[:, 2:5, :3],
        "strided channels": base.contiguous()[:, ::2, :3],
        "expanded": base[:, :, :1].expand(-1, -1, 3, -1, -1),
    }
    for name, x in views.items():
        cache = base[:, : x.shape[1], 3:4, : x.shape[3], : x.shape[4]]
        with use_backend(backend), poisoned():
            padded, kept = causal_conv_pad(
                x, cache, pad_t=2, pad_h=1, pad_w=1, memory_format=memory_format
            )
        want = plain(x, cache, 2, 1, 1)
        assert torch.equal(padded, want), name
        assert torch.equal(kept, want[:, :, -2:, 1:-1, 1:-1]), name
        assert padded.is_contiguous(memory_format=memory_format), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [FIRST, LAST])
def test_channels_beyond_2_to_the_31st_element(
    backend: str, memory_format: torch.memory_format
) -> None:
    x = clip(1, 3, 2, 2, 4, dtype=torch.float16)
    with use_backend(backend):
        padded, _ = causal_conv_pad(far_apart(x), pad_t=1, pad_w=1, memory_format=memory_format)
    assert torch.equal(padded, plain(x, None, 1, 0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [1, 4, 2], [3, 4], [2, 1, 1, 3]])
@pytest.mark.parametrize("mode_t", ["replicate", "zeros"])
def test_chunks_equal_one_shot(backend: str, chunks: list[int], mode_t: str) -> None:
    """The windows that the convolution sees, and the state in the end."""
    x = clip(1, 6, 7, 3, 4, last=True)
    with use_backend(backend):
        whole, state = causal_conv_pad(x, pad_t=2, pad_h=1, pad_w=1, mode_t=mode_t)
        cache, start = None, 0
        for part in x.split(chunks, 2):
            padded, cache = causal_conv_pad(part, cache, pad_t=2, pad_h=1, pad_w=1, mode_t=mode_t)
            assert torch.equal(padded, whole[:, :, start : start + 2 + part.shape[2]])
            start += part.shape[2]
    assert cache is not None and torch.equal(cache, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_independent_of_their_inputs(backend: str) -> None:
    x = clip(1, 4, 3, 2, 2, last=True)
    with use_backend(backend):
        padded, kept = causal_conv_pad(x, pad_t=0, cache_len=2)
    copies = padded.clone(), kept.clone()
    x.zero_()
    padded_before, kept_before = copies
    assert torch.equal(padded, padded_before)
    padded.zero_()
    assert torch.equal(kept, kept_before)


def gradients(
    x: Tensor, cache: Tensor | None, upstream: tuple[Tensor, Tensor], **options: Any
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, cache) if t is not None]
    outputs = causal_conv_pad(leaves[0], leaves[1] if len(leaves) > 1 else None, **options)
    return list(torch.autograd.grad(outputs, leaves, upstream))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode_t", ["replicate", "zeros"])
@pytest.mark.parametrize(("frames", "cached"), [(3, 0), (1, 0), (4, 1), (1, 2), (1, 3)])
def test_gradients(
    backend: str, dtype: torch.dtype, last: bool, mode_t: str, frames: int, cached: int
) -> None:
    x = clip(2, 5, frames, 3, 4, dtype=dtype, last=last)
    cache = clip(2, 5, cached, 3, 4, dtype=dtype, last=last, seed=2) if cached else None
    upstream = (
        randn(2, 5, frames + 3, 5, 6, dtype=dtype, seed=3),
        randn(2, 5, 3, 3, 4, dtype=dtype, seed=4),
    )
    options = {"pad_t": 3, "pad_h": 1, "pad_w": 1, "mode_t": mode_t}
    with use_backend("reference"):
        exact = gradients(
            x.double(), None if cache is None else cache.double(),
            (upstream[0].double(), upstream[1].double()), **options,
        )  # fmt: skip
        lowp = gradients(x, cache, upstream, **options)
    with use_backend(backend), poisoned():
        got, *again = (gradients(x, cache, upstream, **options) for _ in range(3))
    extra = 1.0 if backend == "triton" and dtype is torch.bfloat16 else 0.0
    for name, g, e, low in zip(("dx", "dcache"), got, exact, lowp, strict=False):
        check(g, e, low, grad=True, extra_ulp=extra, name=name)
        assert g.dtype == dtype
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients_and_only_wanted_ones(backend: str) -> None:
    x, cache = clip(1, 3, 2, 3, 4, last=True), clip(1, 3, 1, 3, 4, last=True, seed=2)
    for wanted in ("x", "cache"):
        leaf = (x if wanted == "x" else cache).detach().requires_grad_()
        with use_backend(backend):
            padded, kept = causal_conv_pad(
                leaf if wanted == "x" else x, leaf if wanted == "cache" else cache,
                pad_t=2, pad_h=1, cache_len=3,
            )  # fmt: skip
            (got,) = torch.autograd.grad(padded.sum() + kept.sum(), leaf)
        # fill (of the cache's frame), cache, x, x; the cache keeps the last three of them
        want = torch.full_like(got, 2.0 if wanted == "x" else 3.0)
        assert torch.equal(got, want), wanted


def test_a_convolution_trains_through_chunks() -> None:
    """Gradients flow through the carried cache: chunked equals one shot."""
    x, weight = clip(1, 4, 5, 3, 3, last=True), randn(6, 4, 3, 3, 3, seed=9)
    grads = []
    for chunks in ([5], [1, 2, 2]):
        leaf = x.detach().requires_grad_()
        cache, outputs = None, []
        for part in leaf.split(chunks, 2):
            padded, cache = causal_conv_pad(part, cache, pad_t=2, pad_h=1, pad_w=1)
            outputs.append(F.conv3d(padded, weight))
        y = torch.cat(outputs, 2)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-3, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 9, 4, 5, 9))),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    cached=st.integers(0, 3),
    last=st.booleans(),
    mode_t=st.sampled_from(["replicate", "zeros"]),
)
def test_any_shape(
    shape: tuple[int, ...], pads: tuple[int, int, int], cached: int, last: bool, mode_t: str
) -> None:
    x = clip(*shape, last=last)
    cached = min(cached, pads[0])
    cache = clip(*shape[:2], cached, *shape[3:], last=not last, seed=2)
    with use_backend("native"), poisoned():
        padded, kept = causal_conv_pad(
            x, cache, pad_t=pads[0], pad_h=pads[1], pad_w=pads[2], mode_t=mode_t
        )
    assert torch.equal(padded, plain(x, cache, *pads, mode_t))
    time = plain(x, cache, pads[0], 0, 0, mode_t)
    assert torch.equal(kept, time[:, :, time.shape[2] - pads[0] :])


@pytest.mark.parametrize(("pad", "channels"), [(0, 96), (1, 96), (1, 33)])
def test_large_frames_past_the_cache_on_any_number_of_threads(pad: int, channels: int) -> None:
    x = clip(1, channels, 5, 64, 80, last=True)
    want = plain(x, None, 2, pad, pad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with use_backend("native"), poisoned():
                padded, kept = causal_conv_pad(x, pad_t=2, pad_h=pad, pad_w=pad)
            assert torch.equal(padded, want) and torch.equal(kept, x[:, :, -2:])
    finally:
        torch.set_num_threads(threads)


def test_gradcheck_of_the_reference() -> None:
    x = clip(1, 2, 2, 2, 3).double().requires_grad_()
    cache = clip(1, 2, 1, 2, 3, seed=2).double().requires_grad_()
    for mode_t in ("replicate", "zeros"):
        assert torch.autograd.gradcheck(
            lambda a, b, m=mode_t: causal_conv_pad(a, b, pad_t=3, pad_h=1, pad_w=1, mode_t=m),
            (x, cache),
        )


# --- registration -------------------------------------------------------------------------------


def test_opcheck() -> None:
    ops = torch.ops.sora_kernels
    x, cache = randn(2, 1, 3, 4, 5, 6), randn(2, 1, 1, 4, 5, 6, seed=1)
    for old in (cache, None):
        arguments = (x, old, 2, 1, 1, 0, 2, True, 2)
        torch.library.opcheck(ops.causal_conv_pad_fwd.default, arguments)
        padded, kept = ops.causal_conv_pad_fwd(*arguments)
        frames = 0 if old is None else 1
        for needs in (1, 3) if frames else (1,):
            torch.library.opcheck(
                ops.causal_conv_pad_bwd.default,
                (padded, kept, frames, 2, 1, 1, 0, 2, True, needs),
            )


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    x = randn(1, 1, 2, 2, 2, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.causal_conv_pad_fwd(x, None, 2, 0, 0, 0, 0, True, 2)


def test_fullgraph_and_dynamic_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        padded, kept = causal_conv_pad(x * 2, cache, pad_t=2, pad_h=1, pad_w=1)
        return padded.tanh(), kept

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for frames in (3, 4, 6, 5):
        x = clip(1, 4, frames, 3, 6, last=True).requires_grad_()
        cache = clip(1, 4, 2, 3, 6, last=True, seed=2).requires_grad_()
        got, want = compiled(x, cache), block(x, cache)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        grads = [torch.autograd.grad([o.sum() for o in out], (x, cache)) for out in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four lengths"


def test_meta_device_and_empty_input() -> None:
    x = torch.empty(2, 3, 4, 5, 6, device="meta")
    padded, kept = causal_conv_pad(x, pad_t=2, pad_w=1)
    assert padded.shape == (2, 3, 6, 5, 8) and kept.shape == (2, 3, 2, 5, 6)
    padded, kept = causal_conv_pad(torch.zeros(0, 3, 4, 5, 6), pad_t=2)
    assert padded.shape == (0, 3, 6, 5, 6) and kept.shape == (0, 3, 2, 5, 6)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(3, 2, 4, 4)}, ValueError, r"x: expected shape \[B, C, T, H, W\]"),
        ({"x": torch.zeros(1, 3, 2, 4, 4, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": None}, TypeError, "x: expected a Tensor"),
        ({"x": torch.zeros(1, 3, 0, 4, 4)}, ValueError, "x: expected at least one frame"),
        ({"cache": torch.zeros(1, 2, 1, 4, 4)}, ValueError, "cache: expected shape"),
        ({"cache": torch.zeros(1, 3, 3, 4, 4)}, ValueError, "cache: expected at most pad_t = 2"),
        ({"cache": torch.zeros(1, 3, 1, 4, 4).half()}, TypeError, "cache: expected dtype"),
        (
            {"cache": torch.zeros(1, 3, 1, 4, 4, device="meta")},
            ValueError,
            "cache: expected device cpu",
        ),
        ({"pad_t": -1}, ValueError, "pad_t: expected at least 0"),
        ({"pad_h": -1}, ValueError, "pad_h: expected"),
        ({"pad_w": (0, -2)}, ValueError, "pad_w: expected"),
        ({"mode_t": "reflect"}, ValueError, "mode_t: expected one of"),
        ({"cache_len": 5}, ValueError, r"cache_len: expected 0 to 4 \(pad_t \+ T\)"),
        ({"memory_format": torch.channels_last}, ValueError, "memory_format: expected one of"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv_pad(**{"x": torch.zeros(1, 3, 2, 4, 4), "pad_t": 2, **arguments})
