"""Every attention library that can run here gives what our kernel gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sora_kernels import PackedLayout, Text, packed_attention
from sora_kernels.ops.packed_attention.libraries import LIBRARIES, OWN
from tests.gpu.common import needs_gpu

pytestmark = needs_gpu


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[512, 512, 512], [700, 0, 33, 1100]])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("library", LIBRARIES)
def test_library_agrees(library: str, head_dim: int, lengths: list[int], causal: bool) -> None:
    layout = PackedLayout([[Text(n)] for n in lengths], device="cuda")
    torch.manual_seed(0)
    qkv = torch.randn(layout.num_tokens, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(layout.num_tokens, 4, head_dim, device="cuda", dtype=torch.bfloat16)

    def run(name: str) -> list[torch.Tensor]:
        x = qkv.detach().requires_grad_()
        out: Any = packed_attention(
            *x.unbind(1), layout, causal=causal, library=name, deterministic=False
        )
        return [out, *torch.autograd.grad(out, x, dout)]

    expected = run(OWN)
    try:
        found = run(library)
    except ValueError as error:
        pytest.skip(str(error))
    for mine, theirs in zip(expected, found, strict=True):
        error = (mine.float() - theirs.float()).norm() / mine.float().norm()
        assert error < 0.02, f"{library}: relative error {error:.4f}"
