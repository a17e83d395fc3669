"""qk_norm_rope of joint models: text and video with norms of their own, in one packed sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import (
    Grid,
    PackedLayout,
    Rope,
    Text,
    joint_index,
    qk_norm_rope,
    qk_norm_rope_joint,
    use_backend,
)
from sora_kernels.ops.qk_norm_rope import config
from tests.helpers import check, poisoned, randn

BACKENDS = ("native", "triton")
# Text first, text last, text on both sides, and none at all.
SEGMENTS = [[Text(3), Grid(1, 2, 3)], [Grid(1, 2, 2), Text(2)], [Text(1), Grid(1, 1, 2), Text(1)]]
AXES = {32: (8, 12, 12), 40: (8, 12, 12), 64: (16, 24, 24)}
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program of the Triton backward, as on a GPU with many more tokens."""
    monkeypatch.setattr(config, "_BACKWARD_PROGRAMS", 2)


def make(
    layout: PackedLayout, heads: tuple[int, int], width: int, norm: str | None, v: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    """Views of one projection per stream (0: text, 1: video), and parameters, by name."""
    made: Tensors = {}
    hq, hk = heads
    for s, n in enumerate((layout.num_text_tokens, layout.num_grid_tokens)):
        packed = randn(n, hq + 2 * hk + 1, width, seed=s, dtype=dtype)
        cuts = {"q": packed[:, :hq], "k": packed[:, hq + 1 : hq + 1 + hk], "v": packed[:, -hk:]}
        made |= {f"{name}{s}": t for name, t in cuts.items() if v or name != "v"}
        for i, (side, h) in enumerate((("q", hq), ("k", hk))):
            size = width * (h if norm == "rms_full" else 1)
            if norm:
                made[f"{side}_weight{s}"] = randn(size, seed=10 + 2 * s + i)
            if norm == "layer":
                made[f"{side}_bias{s}"] = randn(size, seed=20 + 2 * s + i)
    return {name: t.detach().requires_grad_() for name, t in made.items()}


def pairs(given: Tensors, name: str) -> list[Tensor] | None:
    return [given[f"{name}0"], given[f"{name}1"]] if f"{name}0" in given else None


def joint(given: Tensors, layout: PackedLayout, rope: Rope | None, **options: Any) -> Any:
    streams = list(zip(*(pairs(given, x) or [] for x in "qkv" if f"{x}0" in given), strict=True))
    return qk_norm_rope_joint(
        streams, pairs(given, "q_weight"), pairs(given, "k_weight"), rope,
        index=(layout.text_tokens, layout.grid_tokens), q_bias=pairs(given, "q_bias"),
        k_bias=pairs(given, "k_bias"), **options,
    )  # fmt: skip


def plain(given: Tensors, layout: PackedLayout, rope: Rope | None, **options: Any) -> list[Tensor]:
    """Each stream on its own, then put where it belongs: what the one call replaces."""
    index = (layout.text_tokens, layout.grid_tokens)
    results = []
    for s, rows in enumerate(index):
        mine = {name[:-1]: t for name, t in given.items() if name[-1] == str(s)}
        v = mine.pop("v", None)
        piece = rope and Rope(rope.cos, rope.sin, rope.position_index[rows], rope.axes)
        results.append(
            [*qk_norm_rope(**mine, rope=piece, **options), *([v] if v is not None else [])]
        )
    source = torch.argsort(torch.cat(index))
    return [torch.cat(parts)[source] for parts in zip(*results, strict=True)]


def with_grads(call: Any, given: Tensors, upstream: list[Tensor]) -> Tensors:
    outputs = list(call(given))
    dtype = outputs[0].dtype
    leaves = list(given.values())
    grads = torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream[: len(outputs)]])
    results = {f"out{i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(given, grads, strict=True)}


def upstream_of(layout: PackedLayout, heads: tuple[int, int], width: int) -> list[Tensor]:
    hq, hk = heads
    return [randn(layout.num_tokens, h, width, seed=40 + i) for i, h in enumerate((hq, hk, hk))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norm", "pairing", "width"),
    [
        ("rms", "interleaved", 64),  # HunyuanVideo, Flux, Qwen-Image (eps 1e-6), Mochi (1e-5)
        ("rms", "half", 40),
        ("layer", "half_per_axis", 40),
        ("layer", "interleaved", 64),  # CogVideoX
        ("rms_full", "interleaved", 64),
        (None, "interleaved", 40),
    ],
)
def test_two_streams_into_one_sequence(
    backend: str, norm: str | None, pairing: str, width: int
) -> None:
    layout = PackedLayout(SEGMENTS)
    rope = layout.rope(AXES[width])
    heads = (2, 1)
    given = make(layout, heads, width, norm)
    upstream = upstream_of(layout, heads, width)
    options: dict[str, Any] = {"norm": norm, "pairing": pairing, "eps": 1e-5}
    with use_backend("reference"):
        doubled = {name: t.detach().double().requires_grad_() for name, t in given.items()}
        exact = with_grads(lambda t: plain(t, layout, rope, **options), doubled, upstream)
        lowp = with_grads(lambda t: plain(t, layout, rope, **options), given, upstream)
        mine = with_grads(lambda t: joint(t, layout, rope, **options), given, upstream)
    with use_backend(backend), poisoned():
        got = with_grads(lambda t: joint(t, layout, rope, **options), given, upstream)
    for name, value in exact.items():
        check(mine[name], value, lowp[name], grad=name[0] == "d", name=f"reference {name}")
        check(got[name], value, lowp[name], grad=name[0] == "d", name=f"{backend} {name}")
    assert torch.equal(got["out2"], mine["out2"]) and torch.equal(got["dv0"], mine["dv0"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rotation_and_without_v(backend: str) -> None:
    """SD3.5: norms of their own, no rotation."""
    layout = PackedLayout(SEGMENTS)
    given = make(layout, (2, 2), 32, "rms", v=False)
    upstream = upstream_of(layout, (2, 2), 32)
    with use_backend("reference"):
        expected = with_grads(lambda t: plain(t, layout, None), given, upstream)
    with use_backend(backend), poisoned():
        got = with_grads(lambda t: joint(t, layout, None), given, upstream)
    assert got.keys() == expected.keys() and "out2" not in got
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "rms_full"])
def test_groups_of_one_packed_tensor(backend: str, norm: str) -> None:
    """One packed q and k, weights per group: the bits of separate streams, wherever they lie."""
    layout = PackedLayout(SEGMENTS)
    rope = layout.rope(AXES[64])
    given = make(layout, (2, 1), 64, norm, v=False)
    upstream = upstream_of(layout, (2, 1), 64)
    index = (layout.text_tokens, layout.grid_tokens)
    whole = {
        x: torch.empty(layout.num_tokens, h, 64).index_copy(0, index[0], given[f"{x}0"].detach())
        .index_copy(0, index[1], given[f"{x}1"].detach()).requires_grad_()
        for x, h in (("q", 2), ("k", 1))
    }  # fmt: skip
    packed = whole | {name: t for name, t in given.items() if "_" in name}

    def call(t: Tensors) -> tuple[Tensor, Tensor]:
        names = ("q_weight", "k_weight", "q_bias", "k_bias")
        parameters = {name: pairs(t, name) for name in names}
        return qk_norm_rope(t["q"], t["k"], **parameters, rope=rope, groups=index, norm=norm)

    with use_backend(backend), poisoned():
        expected = with_grads(lambda t: joint(t, layout, rope, norm=norm), given, upstream)
        got = with_grads(call, packed, upstream)
    for name, value in got.items():
        if name in ("dq", "dk"):
            for s, rows in enumerate(index):
                assert torch.equal(value[rows], expected[f"{name}{s}"]), name
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_batches(backend: str) -> None:
    """[B, l, H, D] streams, one after the other in each sample: the layout of diffusers."""
    rope = PackedLayout([[Text(2), Grid(1, 2, 2)]]).rope(AXES[32])
    text, video = (
        [randn(3, 9, 2, 32, seed=3 * s + i)[:, 1 : 1 + n].requires_grad_() for i in range(3)]
        for s, n in enumerate((2, 4))
    )
    weights = [randn(32, seed=30 + s).requires_grad_() for s in range(2)]
    upstream = [randn(3, 6, 2, 32, seed=40 + i) for i in range(3)]

    def separate() -> list[Tensor]:
        parts = [
            qk_norm_rope(q, k, w, w) + (v,)
            for (q, k, v), w in zip((text, video), weights, strict=True)
        ]
        q, k, v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return [*qk_norm_rope(q, k, rope=rope, norm=None), v]

    leaves = [*text, *video, *weights]
    with use_backend("reference"):
        expected = separate()
        wanted = torch.autograd.grad(expected, leaves, upstream)
    with use_backend(backend), poisoned():
        got = qk_norm_rope_joint((text, video), weights, weights, rope)
        grads = torch.autograd.grad(got, leaves, upstream)
    for mine, theirs in zip((*got, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    rows = joint_index((2, 4), 3)
    assert rows[0].tolist() == [0, 1, 6, 7, 12, 13] and len(rows[1]) == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_and_empty_streams(backend: str) -> None:
    layout = PackedLayout([[Grid(1, 2, 3)]])  # no text at all
    rope = layout.rope(AXES[32])
    given = make(layout, (2, 2), 32, "rms")
    upstream = upstream_of(layout, (2, 2), 32)
    with use_backend(backend):
        everything = with_grads(lambda t: joint(t, layout, rope), given, upstream)
        assert everything["dq_weight0"].eq(0).all() and everything["dq0"].numel() == 0
        for keep in (("q1",), ("v1",), ("k_weight1", "v1"), ("q_weight0", "k1")):
            some = {k: v.detach().requires_grad_(k in keep) for k, v in given.items()}
            outputs = joint(some, layout, rope)
            grads = torch.autograd.grad(outputs, [some[name] for name in keep], upstream)
            for name, grad in zip(keep, grads, strict=True):
                assert torch.equal(grad, everything[f"d{name}"]), name
        used = joint(given, layout, rope)[2]
        unused = torch.autograd.grad(used.sum(), [given["v1"], given["q1"]], allow_unused=True)
        assert unused[0] is not None and unused[1] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_without_tokens(backend: str) -> None:
    layout = PackedLayout([[Grid(1, 2, 3)]])
    rope = layout.rope(AXES[64])
    x, weight = randn(6, 2, 64, seed=1).requires_grad_(), randn(64, seed=2)
    index = (layout.text_tokens, layout.grid_tokens)
    with use_backend(backend), poisoned():
        q, k = qk_norm_rope(x, x, [-weight, weight], [-weight, weight], rope, groups=index)
        expected, _ = qk_norm_rope(x, x, weight, weight, rope)
        mine, other = (torch.autograd.grad(y, x, x.detach())[0] for y in (q, expected))
    assert torch.equal(q, expected) and torch.equal(k, expected) and torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_with_tables_and_a_length_of_its_own(backend: str) -> None:
    """LTX-2's cross-modal attention: 5 queries and 9 keys, turned by their own clocks."""
    rope, k_rope = (
        Rope.from_tables(randn(n, 16, seed=n).cos(), randn(n, 16, seed=n).sin()) for n in (5, 9)
    )
    q, k = (randn(n, 2, 40, seed=n).requires_grad_() for n in (5, 9))
    weight = randn(40, seed=1).requires_grad_()
    upstream = [randn(n, 2, 40, seed=50) for n in (5, 9)]
    with use_backend("reference"):
        alone = [qk_norm_rope(x, x, weight, weight, r)[0] for x, r in ((q, rope), (k, k_rope))]
        expected = torch.autograd.grad(alone, (q, k, weight), upstream)
    for kept in (0, 1):  # one side alone, then both
        with use_backend(backend), poisoned():
            both = qk_norm_rope(q, k, weight, weight, rope, k_rope=k_rope)
            grads = torch.autograd.grad(both[kept:], (k, weight), upstream[kept:])
        if kept == 0:
            torch.testing.assert_close(grads, expected[1:], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(both, tuple(alone), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(grads[0], expected[1], atol=2e-5, rtol=2e-5)


def test_padded_rope_leaves_its_new_tokens_alone() -> None:
    rope = PackedLayout([[Grid(2, 3, 2)]]).rope(AXES[64]).padded(before=2, after=1)
    x = randn(15, 2, 64)
    y, _ = qk_norm_rope(x, x, rope=rope, norm=None)
    still = [0, 1, 14]
    assert rope.num_tokens == 15 and torch.equal(y[still], x[still])
    assert not torch.equal(y[3:14], x[3:14])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_conversion_has_the_bits_of_the_integer_one(dtype: torch.dtype) -> None:
    """The AVX-512 BF16 instruction rounds normal numbers as the other instruction sets do."""
    code = (
        "import torch, hashlib\n"
        "from sora_kernels import Rope, qk_norm_rope\n"
        "g = torch.Generator().manual_seed(1)\n"
        f"x = torch.randn(500, 4, 72, generator=g).to({dtype}).requires_grad_()\n"
        "a = torch.randn(500, 36, generator=g)\n"
        "w = torch.randn(72, generator=g)\n"
        "q, k = qk_norm_rope(x, x, w, w, Rope.from_tables(a.cos(), a.sin()))\n"
        "d, = torch.autograd.grad((q, k), x, (x.detach(), q.detach()))\n"
        "bits = torch.cat((q, k, d)).detach().float().numpy().tobytes()\n"
        "print(hashlib.sha256(bits).hexdigest())\n"
    )
    hashes = set()
    for isa in ("avx512", "avx512_bf16"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"SORA_KERNELS_ISA": isa}, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        hashes.add(done.stdout)
    assert len(hashes) == 1


# --- registration -------------------------------------------------------------------------------


def test_opcheck_of_streams() -> None:
    layout = PackedLayout(SEGMENTS)
    rope = layout.rope((4, 2, 2))
    given = {name: t.detach() for name, t in make(layout, (2, 1), 8, "rms").items()}
    lists = [pairs(given, x) or [] for x in ("q", "k", "v", "q_weight", "k_weight")]
    tables = (rope.cos, rope.sin, rope.position_index, None)
    index = [layout.text_tokens, layout.grid_tokens]
    arguments = (
        *lists, [], [], index, layout.num_tokens, *tables, *tables, *[0] * 4, [4, 2, 2],
        1, 1e-6, 0, 0,
    )  # fmt: skip
    ops = torch.ops.sora_kernels
    torch.library.opcheck(ops.qk_norm_rope_fwd.default, arguments)
    dy = upstream_of(layout, (2, 1), 8)
    torch.library.opcheck(ops.qk_norm_rope_bwd.default, (*dy, *arguments, [1] * 10))


def test_fullgraph() -> None:
    layout = PackedLayout(SEGMENTS)
    rope = layout.rope(AXES[32])
    given = make(layout, (2, 2), 32, "rms")
    upstream = upstream_of(layout, (2, 2), 32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: joint(t, layout, rope), fullgraph=True, backend="aot_eager")
    expected = with_grads(lambda t: joint(t, layout, rope), given, upstream)
    got = with_grads(compiled, given, upstream)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


X = torch.zeros(4, 2, 8)
ROWS = (torch.arange(4), torch.arange(4, 8))


@pytest.mark.parametrize(
    ("error", "match", "streams", "options"),
    [
        (ValueError, "streams: expected at least two", [(X, X)], {}),
        (ValueError, "streams: expected at least two", [(X, X), (X, X, X)], {}),
        (ValueError, r"streams\[1\].q: expected heads like", [(X, X), (X[:, :1], X)], {}),
        (ValueError, r"streams\[1\].k: expected the tokens", [(X, X), (X, X[:2])], {}),
        (TypeError, r"streams\[1\].q: expected torch.float32", [(X, X), (X.half(), X.half())], {}),
        (ValueError, r"index\[1\]: expected 4 tokens, got 2", [(X, X)] * 2,
         {"index": (ROWS[0], ROWS[1][:2])}),
        (TypeError, r"index\[0\]: expected an int64", [(X, X)] * 2,
         {"index": (ROWS[0].int(), ROWS[1])}),
        (ValueError, "q_weight: expected one for each of 2", [(X, X)] * 2,
         {"q_weight": [torch.ones(8)]}),
    ],
)  # fmt: skip
def test_bad_input(
    error: type[Exception], match: str, streams: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        qk_norm_rope_joint(streams, **options)


def test_an_index_out_of_range_writes_nothing() -> None:
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match=r"index: expected values in \[0, 8"),
    ):
        qk_norm_rope_joint([(X, X)] * 2, index=(ROWS[0], ROWS[1] + 1))
    with use_backend("native"), pytest.raises(RuntimeError, match=r"in \[0, 4\), got -1"):
        qk_norm_rope(X, X, groups=(ROWS[0][:2], ROWS[0][2:] - 3))


def test_bad_groups_and_tables() -> None:
    with pytest.raises(ValueError, match="groups: expected every one of 4 tokens in one group"):
        qk_norm_rope(X, X, groups=(ROWS[0][:1], ROWS[0][2:]))
    table = Rope.from_tables(torch.ones(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="k_rope: expected None without rope"):
        qk_norm_rope(X, X, k_rope=table)
    with pytest.raises(ValueError, match=r"k_rope.axes: expected the layout of rope's, \(8,\)"):
        other = Rope(table.cos[:, :2].contiguous(), table.sin[:, :2].contiguous(),
                     table.position_index, (4,))  # fmt: skip
        qk_norm_rope(X, X, rope=table, k_rope=other)
