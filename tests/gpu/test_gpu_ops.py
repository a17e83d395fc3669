"""Every op on a GPU, through its public function: accuracy, determinism, compile, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels import backend
from tests.gpu.common import DEVICE, captured, needs_gpu
from tests.helpers import check, poisoned, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = needs_gpu

LAYOUT = [
    [sk.Text(7), sk.Grid(3, 9, 14)],
    [sk.Grid(1, 16, 16)],
    [sk.Text(33), sk.Grid(5, 6, 10, origin=(2.0, 0.0, 0.0))],
    [sk.Grid(1, 1, 1)],
]


@dataclass(frozen=True)
class Case:
    """`call(**inputs)` returns a tensor or a tuple; all inputs are differentiated."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]


def layout(order: str = "raster") -> sk.PackedLayout:
    return sk.PackedLayout(LAYOUT, order=order, device=DEVICE)


def _norm(width: int, **options: str) -> Case:
    pack = layout()
    r = pack.num_segments
    shapes = {"x": (pack.num_tokens, width), "shift": (r, width), "scale": (r, width)}
    return Case(
        "norm_modulate",
        {**shapes, "weight": (width,), "bias": (width,)},
        lambda **a: sk.norm_modulate(**a, rows=pack.segment_rows, **options),
    )


def _norm_two_per_token(width: int) -> Case:
    names = ("x", "shift", "scale", "shift2", "scale2")
    return Case(
        "norm_modulate",
        dict.fromkeys(names, (2, 150, width)),
        lambda **a: sk.norm_modulate(**a, norm="rms", per="token"),
    )


def _gate(width: int) -> Case:
    pack = layout()
    n, r = pack.num_tokens, pack.num_parts
    return Case(
        "gate_residual",
        {"x": (n, width), "y": (n, width), "gate": (r, width), "gate_table": (width,)},
        lambda **a: sk.gate_residual(**a, rows=pack.part_rows),
    )


def _tanh_gate(width: int) -> Case:
    shapes = {"x": (2, 150, width), "y": (2, 150, width), "gate": (2, width), "weight": (width,)}
    return Case("gate_residual", shapes, lambda **a: sk.gate_residual(**a, tanh=True, norm="rms"))


def _gate_norm(width: int) -> Case:
    pack = layout()
    n, r = pack.num_tokens, pack.num_segments
    shapes = {"x": (n, width), "y": (n, width)}
    shapes |= dict.fromkeys(("gate", "shift", "scale"), (r, width))
    return Case(
        "gate_residual_norm_modulate",
        shapes,
        lambda **a: sk.gate_residual_norm_modulate(**a, rows=pack.segment_rows),
    )


def _qk(heads: int, width: int, norm: str, pairing: str) -> Case:
    pack = layout("tile")
    rest = width // 4 * 2
    rope = pack.rope((width - 2 * (rest // 4 * 2), rest // 4 * 2, rest // 4 * 2))
    weight = heads * width if norm == "rms_full" else width

    def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.unbind(1)
        return sk.qk_norm_rope(q, k, q_weight, k_weight, rope, norm=norm, pairing=pairing)

    shapes = {"qkv": (pack.num_tokens, 3, heads, width)}
    return Case("qk_norm_rope", {**shapes, "q_weight": (weight,), "k_weight": (weight,)}, call)


def _attention(heads: int, key_heads: int, width: int) -> Case:
    pack = layout()
    n = pack.num_tokens
    return Case(
        "packed_attention",
        {"q": (n, heads, width), "k": (n, key_heads, width), "v": (n, key_heads, width)},
        lambda **a: sk.packed_attention(**a, layout=pack),
    )


def _gelu(width: int) -> Case:
    return Case("bias_gelu", {"x": (2, 150, width), "bias": (width,)}, sk.bias_gelu)


def _guided(packed: bool) -> Case:
    """Packed clips, each with its own time step and guidance; or dense latents."""
    names = ("x", "cond", "uncond")
    if packed:
        pack = layout()
        dt = torch.linspace(-0.4, -0.1, pack.num_segments, device=DEVICE)
        return Case(
            "guided_step",
            dict.fromkeys(names, (pack.num_tokens, 64)),
            lambda **a: sk.guided_step(**a, dt=dt, guidance=1 - 10 * dt, rows=pack.segment_rows),
        )
    shapes = dict.fromkeys(names, (2, 16, 3, 9, 14))
    return Case("guided_step", shapes, lambda **a: sk.guided_step(**a, dt=-0.1, guidance=6.0))


def _conv_pad() -> Case:
    shapes = {"x": (2, 96, 5, 9, 14), "cache": (2, 96, 1, 9, 14)}

    def call(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return sk.causal_conv_pad(x, cache, pad_t=2, pad_h=1, pad_w=1)

    return Case("causal_conv_pad", shapes, call)


def _norm_silu(channels: int, norm: str, channels_last: bool) -> Case:
    shapes = {"x": (2, channels, 3, 9, 14), "weight": (channels,), "bias": (channels,)}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return sk.norm_silu(x, weight, bias, norm=norm)

    return Case("norm_silu", shapes, call)


CASES: dict[str, Callable[[], Case]] = {
    "norm_modulate-layer-1152": lambda: _norm(1152, norm="layer"),
    "norm_modulate-rms-100": lambda: _norm(100, norm="rms"),
    "norm_modulate-two-per-token-3072": lambda: _norm_two_per_token(3072),
    "gate_residual-1536": lambda: _gate(1536),
    "gate_residual-tanh-norm-240": lambda: _tanh_gate(240),
    "gate_residual_norm_modulate-384": lambda: _gate_norm(384),
    "gate_residual_norm_modulate-5120": lambda: _gate_norm(5120),
    "qk_norm_rope-rms-128": lambda: _qk(6, 128, "rms", "interleaved"),
    "qk_norm_rope-rms_full-64": lambda: _qk(5, 64, "rms_full", "half"),
    "qk_norm_rope-layer-72": lambda: _qk(3, 72, "layer", "half_per_axis"),
    "bias_gelu-1536": lambda: _gelu(1536),
    "bias_gelu-100": lambda: _gelu(100),
    "guided_step-packed": lambda: _guided(packed=True),
    "guided_step-dense": lambda: _guided(packed=False),
    "causal_conv_pad-96": _conv_pad,
    "norm_silu-l2-96": lambda: _norm_silu(96, "l2", channels_last=True),
    "norm_silu-rms-384": lambda: _norm_silu(384, "rms", channels_last=True),
    "norm_silu-group-128": lambda: _norm_silu(128, "group", channels_last=False),
    "packed_attention-64": lambda: _attention(6, 6, 64),
    "packed_attention-grouped-128": lambda: _attention(8, 2, 128),
    "packed_attention-72": lambda: _attention(3, 3, 72),
}


#: Every case on what CUDA runs by default, and on the ahead-of-time kernels where there are some.
RUNS = [(name, None) for name in CASES]
RUNS += [
    (name, "native") for name in CASES if f"{name.split('-')[0]}_fwd_cuda" in backend.cuda_ops()
]
IDS = [f"{name}-{chosen}" if chosen else name for name, chosen in RUNS]


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Forces the backend of a run."""
    op = request.node.callspec.params["name"].split("-")[0]
    if request.param == "native" and backend.why_not(op, "native", "cuda"):
        pytest.skip("the CUDA library is not built")
    with sk.use_backend(request.param):
        yield request.param


every_run = pytest.mark.parametrize(("name", "chosen"), RUNS, ids=IDS, indirect=["chosen"])


def make_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: randn(*shape, dtype=dtype, seed=i).to(DEVICE)
        for i, (name, shape) in enumerate(case.shapes.items())
    }


def run(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], upstream: str
) -> dict[str, Tensor]:
    """Outputs and gradients by name; upstream gradients hold numbers of dtype `upstream`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    result = call(**leaves)
    outputs = (result,) if isinstance(result, Tensor) else result
    grads = [
        randn(*o.shape, dtype=getattr(torch, upstream), seed=100 + i).to(DEVICE, o.dtype)
        for i, o in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_within_bounds(
    case: Case, got: dict[str, Tensor], inputs: dict[str, Tensor], upstream: str
) -> None:
    """The 2x rule (3x for gradients) against the reference in fp64 and in the kernel's dtype."""
    with sk.use_backend("reference"):
        exact = run(case.call, {k: v.double() for k, v in inputs.items()}, upstream)
        lowp = run(case.call, inputs, upstream)
    for name, value in got.items():
        check(value, exact[name], lowp[name], grad=name.startswith("d"), name=name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@every_run
def test_accuracy_forward_and_backward(name: str, chosen: str | None, dtype: torch.dtype) -> None:
    case = CASES[name]()
    inputs = make_inputs(case, dtype)
    with poisoned():
        got = run(case.call, inputs, dtype_name(dtype))
    if chosen is None:
        assert f"{case.op} on cuda: triton" in sk.explain().splitlines()
    assert_within_bounds(case, got, inputs, dtype_name(dtype))


@every_run
def test_every_run_gives_the_same_bits(name: str, chosen: str | None) -> None:
    case = CASES[name]()
    inputs = make_inputs(case, torch.bfloat16)
    first = run(case.call, inputs, "bfloat16")
    for _ in range(2):
        again = run(case.call, inputs, "bfloat16")
        assert all(torch.equal(first[key], again[key]) for key in first)


@every_run
def test_compiles_into_one_graph(name: str, chosen: str | None) -> None:
    torch.compiler.reset()
    case = CASES[name]()
    inputs = make_inputs(case, torch.bfloat16)
    compiled = torch.compile(case.call, fullgraph=True)
    got = run(compiled, inputs, "bfloat16")
    assert_within_bounds(case, got, inputs, "bfloat16")


@every_run
def test_a_cuda_graph_replays_with_new_data(name: str, chosen: str | None) -> None:
    case = CASES[name]()
    static = make_inputs(case, torch.bfloat16)
    fresh = {key: torch.flip(x, (0,)).clone() for key, x in static.items()}
    with torch.no_grad():
        expected = case.call(**fresh)
        graph, result = captured(lambda: case.call(**static))
        for key, x in fresh.items():
            static[key].copy_(x)
        graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(_tuple(result), _tuple(expected), strict=True):
        assert torch.equal(got, want)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


LONG = 2**21 + 8  # tokens of 1024 numbers: the last ones lie beyond 2^31


LONG_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm_modulate": lambda x, v: sk.norm_modulate(x, v, v, per="all"),
    "gate_residual": lambda x, v: sk.gate_residual(x, x, v, per="all"),
    "gate_residual_norm_modulate": lambda x, v: sk.gate_residual_norm_modulate(
        x, x, v, v, v, per="all"
    )[1],
    "qk_norm_rope": lambda x, v: sk.qk_norm_rope(
        x.view(-1, 8, 128), x.view(-1, 8, 128), v[:128], norm="rms"
    )[0].flatten(1),
    "bias_gelu": sk.bias_gelu,
    "guided_step": lambda x, v: sk.guided_step(x, 2 * x, x, dt=-0.1, guidance=3.0),
}


@pytest.mark.parametrize("name", LONG_OPS)
def test_tokens_beyond_2_to_the_31st_element(name: str) -> None:
    """The last tokens of a long sequence come out as they do alone, forward and backward."""
    vector = torch.linspace(-1, 1, 1024, device=DEVICE)
    tail = randn(8, 1024, dtype=torch.bfloat16).to(DEVICE)
    results = []
    for tokens in (LONG, 8):
        x = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device=DEVICE)
        x[-8:] = tail
        x.requires_grad_()
        y = LONG_OPS[name](x, vector)
        dy = torch.zeros_like(y)
        dy[-8:] = tail
        (dx,) = torch.autograd.grad(y, x, dy)
        results.append((y[-8:].detach().clone(), dx[-8:].clone()))
        del x, y, dy, dx
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_video_norm_beyond_2_to_the_31st_element_and_beside_a_nan(norm: str) -> None:
    """Channels first: the last channel of a long video; a NaN stays in its position, all of it."""
    length = 2**31 // 15 + 16
    tail = randn(1, 16, 1, 1, 32, dtype=torch.bfloat16).to(DEVICE)
    tail[0, 3, 0, 0, 5] = float("nan")
    x = torch.zeros(1, 16, 1, 1, length, dtype=torch.bfloat16, device=DEVICE)
    x[..., -32:] = tail
    y = sk.norm_silu(x, norm=norm)[..., -32:]
    alone = sk.norm_silu(tail, norm=norm)
    assert torch.equal(y.nan_to_num(7.0), alone.nan_to_num(7.0))
    assert torch.equal(y.isnan()[0, :, 0, 0].sum(1), torch.full((16,), 1, device=DEVICE))


def test_attention_in_a_pack_has_the_bits_of_the_segment_alone() -> None:
    pack = layout()
    shapes = dict.fromkeys("qkv", (pack.num_tokens, 4, 64))
    inputs = make_inputs(Case("packed_attention", shapes, sk.packed_attention), torch.bfloat16)
    together = run(lambda **a: sk.packed_attention(**a, layout=pack), inputs, "bfloat16")
    upstream = randn(pack.num_tokens, 4, 64, dtype=torch.bfloat16, seed=100).to(DEVICE)
    start = 0
    for segment, length in zip(LAYOUT, pack.seqlens, strict=True):
        own = slice(start, start + length)
        alone = sk.PackedLayout([segment], device=DEVICE)
        leaves = [x[own].detach().clone().requires_grad_() for x in inputs.values()]
        out = sk.packed_attention(*leaves, layout=alone)
        (dq,) = torch.autograd.grad(out, leaves[:1], upstream[own])
        assert torch.equal(out, together["out0"][own])
        assert torch.equal(dq, together["dq"][own])
        start += length


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_patchify_and_back_is_exact(order: str) -> None:
    sizes = [(3, 8, 12), (1, 16, 16), (2, 6, 10)]
    pack = sk.PackedLayout.from_grids(sizes, patch=(1, 2, 2), order=order, device=DEVICE)
    videos = [randn(16, *size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(sizes)]
    tokens = sk.patchify([video.to(DEVICE) for video in videos], pack)
    on_cpu = sk.PackedLayout.from_grids(sizes, patch=(1, 2, 2), order=order)
    assert torch.equal(tokens.cpu(), sk.patchify(videos, on_cpu))
    for video, back in zip(videos, sk.unpatchify(tokens, pack, 16), strict=True):
        assert torch.equal(video, back.cpu())
