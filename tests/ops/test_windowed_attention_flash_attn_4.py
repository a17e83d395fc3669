"""Windowed attention by flash-attn 4, whose place a stand-in takes: plumbing, choice, reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import Grid, PackedLayout, Text, Window, backend, packed_attention
from sora_kernels.ops import packed_attention as package
from sora_kernels.ops.packed_attention import libraries, prepare_window
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN
from sora_kernels.ops.windowed_attention import flash_attn_4
from tests.helpers import randn
from tests.ops import flash_attn_4_stand_in as stand_in
from tests.ops.test_packed_attention_libraries import H100
from tests.ops.windowed import masked_attention, tile_mask

HOPPER, BLACKWELL = (9, 0), (10, 0)
PACK: list[Any] = [
    [Text(37), Grid(3, 9, 10, tile=(2, 4, 4)), Grid(1, 3, 4, given=True)],
    [Grid(1, 11, 9, tile=(1, 8, 8)), Text(5)],
    [Text(20)],
]
WINDOWS = {
    "clamped": Window((3, 1, 3)),
    "truncated": Window((1, 3, 1), "truncate"),
    "causal-sink": Window((2, 1, None), causal=True, sink=1),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As on Hopper with the library installed."""
    yield from installed(monkeypatch, HOPPER)


def installed(monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int]) -> Iterator[list[str]]:
    flash_attn_4.mask_function.cache_clear()
    for module in (libraries, package):
        monkeypatch.setattr(module, "chip_of", lambda q: chip)
    monkeypatch.setattr("sora_kernels.ops.packed_attention.config.chip_of", lambda q: chip)
    monkeypatch.setattr(libraries, "_installed", lambda module: True)
    yield stand_in.install(monkeypatch, flash_attn_4.block_of(chip))
    flash_attn_4.mask_function.cache_clear()


def run(fn: Any, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = fn(*leaves)
    grads = torch.autograd.grad(
        (out, lse), leaves, (randn(*out.shape, seed=3).to(out), randn(*lse.shape, seed=4).to(lse))
    )
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL])
@pytest.mark.parametrize("name", WINDOWS)
def test_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, name: str, chip: tuple[int, int]
) -> None:
    """Argument order, layouts, LSE, lists of both directions and the mask function itself."""
    layout, window = PackedLayout(PACK, order="tile"), WINDOWS[name]
    heads_k = 1 if name == "truncated" else 2
    tensors = [randn(layout.num_tokens, h, 8, seed=h).double() for h in (2, heads_k, heads_k)]
    deterministic = chip == BLACKWELL
    seen = tile_mask(layout, window)
    for calls in installed(monkeypatch, chip):
        got = run(
            lambda q, k, v: flash_attn_4.run(
                q, k, v, layout, window, 0.3, chip, deterministic=deterministic
            ),
            tensors,
        )
        assert calls == ["forward", "deterministic backward" if deterministic else "backward"]
    want = run(lambda q, k, v: masked_attention(q, k, v, seen, 0.3), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_only_asked_gradients_and_lse_alone(calls: list[str]) -> None:
    layout = PackedLayout(PACK, order="tile")
    q, k, v = randn(layout.num_tokens, 3, 1, 8).double().unbind(1)
    q = q.detach().requires_grad_()
    lse = flash_attn_4.run(q, k, v, layout, Window((3, 3, 3)), 0.3, HOPPER, False)[1]
    (found,) = torch.autograd.grad(lse.sum(), q)
    seen = tile_mask(layout, Window((3, 3, 3)))
    (want,) = torch.autograd.grad(masked_attention(q, k, v, seen, 0.3)[1].sum(), q)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_forced_by_name(calls: list[str]) -> None:
    layout, window = PackedLayout(PACK, order="tile"), (3, 3, 3)
    q, k, v = randn(layout.num_tokens, 3, 2, 16, dtype=torch.bfloat16).unbind(1)
    got = packed_attention(q, k, v, layout, window=window, library="flash_attn_4")
    assert calls == ["forward"]
    assert "windowed_attention on cpu: flash_attn_4" in backend.explain()
    own = packed_attention(q, k, v, layout, window=window, library=OWN)
    assert calls == ["forward"]
    torch.testing.assert_close(got, own, atol=1e-2, rtol=1e-2)
    packed_attention(q, k, v, layout, window=window)
    assert calls == ["forward"], "without measurements our kernel runs"


def test_the_measured_choice(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules for windows and rules for dense calls do not meet each other's calls."""
    rules = ({"windowed": True, "training": False, "prefer": ["sdpa_cudnn", "flash_attn_4"]},)
    monkeypatch.setattr(libraries, "rules_of", lambda chip: rules)
    choice = {
        training: libraries.windowed_library(
            torch.zeros(4, 2, 64, dtype=torch.bfloat16), torch.zeros(4, 2, 64), 4, None,
            training=training, return_lse=True, deterministic=True,
        )
        for training in (False, True)
    }  # fmt: skip
    assert choice == {False: "flash_attn_4", True: OWN}
    assert libraries.choose(H100, rules) == (OWN, {})
    windowed = dataclasses.replace(H100, windowed=True)
    assert libraries.choose(windowed, ({"prefer": ["flash_attn_4"]},)) == (OWN, {})
    assert libraries.choose(windowed, rules) == (
        "flash_attn_4", {"sdpa_cudnn": "it has no windows of tiles"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"chip": None}, "needs an NVIDIA GPU"),
        ({"chip": (8, 0)}, "compute capability 9.0"),
        ({"chip": (12, 0)}, "no backward on compute capability 12.0"),
        ({"dtype": torch.float32}, "bf16 or fp16"),
        ({"head_dim": 136}, "up to 128"),
        ({"heads_k": 8, "compiling": True, "return_lse": True, "training": True,
          "deterministic": False}, None),
        ({"training": True}, "not deterministic on compute capability 9.0"),
        ({"training": True, "chip": (10, 0)}, None),
    ],
)  # fmt: skip
def test_predicate_says_why(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(libraries, "_installed", lambda module: True)
    call = dataclasses.replace(H100, windowed=True, **changes)
    found = LIBRARIES["flash_attn_4"].why_not(call)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "flash_attn_4"])
def test_other_libraries_have_no_windows(library: str) -> None:
    layout = PackedLayout(PACK, order="tile")
    q = torch.zeros(layout.num_tokens, 1, 16)
    with pytest.raises(ValueError, match=f"library: {library} cannot run this call: it has no win"):
        packed_attention(q, q, q, layout, window=(1, 1, 1), library=library)
    with pytest.raises(ValueError, match="library: expected one of"):
        packed_attention(q, q, q, layout, window=(1, 1, 1), library="cutlass")


def test_compiles_without_a_graph_break(calls: list[str]) -> None:
    """Forward and backward of two packs in one graph; an unprepared layout is named."""
    frames = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return 2 * packed_attention(
            q, k, v, layout, window=(3, 1, 3), library="flash_attn_4", deterministic=False
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for number in range(3):
        parts = [[Text(3 + 5 * number), Grid(2 + number, 5, 7, tile=(1, 2, 4))], PACK[0]]
        layout = PackedLayout(parts, order="tile")
        q, k, v = (
            x.detach().requires_grad_()
            for x in randn(layout.num_tokens, 3, 1, 8, dtype=torch.bfloat16).unbind(1)
        )
        if number == 0:
            with pytest.raises(Exception, match="(?s)prepare_window|exception"):
                compiled(q, k, v, layout)
            torch._dynamo.reset()
        prepare_window(layout, (3, 1, 3), q, library="flash_attn_4")
        got, want = compiled(q, k, v, layout), attend(q, k, v, layout)
        assert torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (q, k, v)),
            torch.autograd.grad(want.sum(), (q, k, v)),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert frames <= 3


def test_raw_ops(calls: list[str]) -> None:
    layout, window = PackedLayout(PACK, order="tile"), Window((3, 1, 3))
    q, k, v = (x.contiguous() for x in randn(layout.num_tokens, 3, 1, 8).unbind(1))
    made = flash_attn_4.tensors_for(layout, window, HOPPER)
    args = (q, k, v, made.places, list(made.by_query), [128, 128], 0.3)
    ops = torch.ops.sora_kernels
    torch.library.opcheck(ops.windowed_attention_fa4_fwd.default, args)
    out, lse = ops.windowed_attention_fa4_fwd(*args)
    lists = [*made.by_key, made.turn_partial, made.turn_full]
    bwd = (torch.ones_like(out), None, q, k, v, out, lse, made.places, lists, [128, 128], 0.3, True)
    torch.library.opcheck(ops.windowed_attention_fa4_bwd.default, bwd)
    with pytest.raises(RuntimeError, match="windowed_attention_fa4_fwd has no gradient"):
        ops.windowed_attention_fa4_fwd(q.requires_grad_(), *args[1:])


def test_no_tokens(calls: list[str]) -> None:
    layout = PackedLayout([[]], order="tile")
    q = torch.zeros(0, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    out, lse = flash_attn_4.run(q, q, q, layout, Window((1, 1, 1)), 1.0, HOPPER, False)
    out.sum().backward()
    assert (out.shape, lse.shape, q.grad is not None) == ((0, 2, 16), (2, 0), True)
    assert not calls
