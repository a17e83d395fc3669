"""qk_norm_rope as an op of torch, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import Rope, qk_norm_rope
from tests.helpers import randn
from tests.ops.rotated import AXES, leaf, make_rope


def raw_arguments(norm: int = 1, rope: bool = True) -> tuple[Any, ...]:
    q, k = randn(12, 2, 8, seed=1), randn(12, 1, 8, seed=2)
    lists = ([q], [k], [], [randn(8, seed=3)], [], [randn(8, seed=4)] if norm == 2 else [], [])
    table = make_rope(12, (4, 2, 2))
    tables: tuple[Any, ...] = (None,) * 4
    if rope:
        tables = (table.cos, table.sin, table.positions.part_of_token, table.positions.parts)
    return (
        *lists,
        [],
        0,
        *tables,
        *tables,
        *(7, 0) * 2,
        [4, 2, 2] if rope else [],
        norm,
        1e-6,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("norm", "rope", "needs"), [(1, True, [1, 1, 1]), (2, False, [1, 0, 1, 1])]
)
def test_opcheck(norm: int, rope: bool, needs: list[int]) -> None:
    ops = torch.ops.sora_kernels
    arguments = raw_arguments(norm, rope)
    torch.library.opcheck(ops.qk_norm_rope_fwd.default, arguments)
    dy = [torch.randn_like(arguments[side][0]) for side in (0, 1)]
    backward = (*dy, None, *arguments, needs)
    torch.library.opcheck(ops.qk_norm_rope_bwd.default, backward)


def test_raw_op_refuses_to_lose_a_gradient() -> None:
    arguments = raw_arguments()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.sora_kernels.qk_norm_rope_fwd([arguments[0][0].requires_grad_()], *arguments[1:])


def test_fullgraph_and_dynamic_length() -> None:
    """No graph break, and no new compilation for a new length."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(qkv: Tensor, weight: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        q, k, _ = (qkv * 2).unbind(1)
        return qk_norm_rope(q, k, weight, weight, rope)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (63, 100, 12):
        rope = make_rope(tokens, AXES[64])
        qkv, weight = leaf(tokens, 3, 2, 64, seed=1), leaf(64, seed=2)
        upstream = [randn(tokens, 2, 64, seed=3)] * 2
        expected = torch.autograd.grad(block(qkv, weight, rope), (qkv, weight), upstream)
        got = torch.autograd.grad(compiled(qkv, weight, rope), (qkv, weight), upstream)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 2, f"compilations after each length: {counts}"


def test_meta_device() -> None:
    q = torch.empty(2, 5, 3, 64, device="meta", dtype=torch.bfloat16)
    yq, yk = qk_norm_rope(q, q[:, :, :1], torch.empty(64, device="meta"))
    assert yq.shape == q.shape and yk.shape == (2, 5, 1, 64) and yq.dtype is torch.bfloat16


Q = torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "k: expected the dtype of q", {"k": Q.half()}),
        (TypeError, "q: expected a tensor", {"q": [1.0]}),
        (TypeError, "q: expected fp32", {"q": Q.int()}),
        (ValueError, r"q: expected \[N, H, D\]", {"q": Q[0]}),
        (ValueError, "q: expected stride 1", {"q": Q.transpose(1, 2)}),
        (ValueError, "k: expected the rank and head width", {"k": Q[..., :6]}),
        (ValueError, "q: expected an even head width", {"q": Q[..., :5], "k": Q[..., :5]}),
        (ValueError, r"q_weight: expected shape \[8\], got \(16,\)", {"q_weight": torch.ones(16)}),
        (ValueError, r"shape \[16\]", {"q_weight": torch.ones(8), "norm": "rms_full"}),
        (ValueError, "k_bias: expected None with norm='rms'", {"k_bias": torch.ones(8)}),
        (ValueError, "with norm=None", {"q_weight": torch.ones(8), "norm": None}),
        (ValueError, "norm: expected one of", {"norm": "batch"}),
        (ValueError, "pairing: expected one of", {"pairing": "neox"}),
        (ValueError, "law: expected one of", {"law": "none"}),
        (ValueError, "rope: expected 4 tokens, got 12", {"rope": make_rope(12, (4, 2, 2))}),
        (ValueError, "rope.axes: expected a sum of at most 8", {"rope": make_rope(12, (4, 4, 4))}),
        (ValueError, "k: expected the tokens of q", {"k": Q[:2], "rope": make_rope(12, (4, 2, 2))}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        qk_norm_rope(**({"q": Q, "k": Q} | arguments))
