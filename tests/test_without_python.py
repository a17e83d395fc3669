"""A model that calls our ops, compiled ahead of time, runs where sora_kernels is not importable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_kernels import (
    PackedLayout,
    _ext,
    gate_residual_norm_modulate,
    norm_modulate,
    qk_norm_rope,
)

LIBRARY = Path(_ext.__file__).with_name("_C_cpu.so")
RUN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
inputs = torch.load(sys.argv[3])
torch.save(model(*inputs), sys.argv[4])
assert not any(name.split(".")[0] == "sora_kernels" for name in sys.modules), sorted(sys.modules)
"""
#: What is compiled here only calls our ops: nothing to optimise, nor to try instruction sets for.
QUICK = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
}


class Sublayer(nn.Module):
    """The end of one sublayer and the beginning of the next: every kind of argument of a raw op."""

    def __init__(self) -> None:
        super().__init__()
        layout = PackedLayout.from_grids([(3, 8, 8)], patch=(1, 2, 2))  # 48 tokens
        self.rope = layout.rope((8, 12, 12))
        self.register_buffer("weight", torch.linspace(0.5, 1.5, 36))

    def forward(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        gate, shift, scale = rows.unbind(0)  # [3, B, D]
        residual, normed = gate_residual_norm_modulate(x, y, gate, shift, scale, per="sample")
        heads = norm_modulate(normed, shift, scale, per="sample", norm="rms").view(-1, 2, 36)
        q, k = qk_norm_rope(heads, heads, self.weight, rope=self.rope)
        return residual, q, k


def test_a_package_runs_with_the_library_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 24, 72), torch.randn(2, 24, 72), torch.randn(3, 2, 72))
    package, given, result = (tmp_path / name for name in ("block.pt2", "in.pt", "out.pt"))
    with torch.no_grad():
        exported = torch.export.export(Sublayer(), inputs)
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(package), inductor_configs=QUICK
        )
    raw = ("gate_residual_norm_modulate", "norm_modulate", "qk_norm_rope")
    assert {f"sora_kernels.{op}_fwd.default" for op in raw} <= called
    torch.save(inputs, given)
    command = [sys.executable, "-c", RUN, str(LIBRARY), str(package), str(given), str(result)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for got, expected in zip(torch.load(result), Sublayer()(*inputs), strict=True):
        assert torch.equal(got, expected)
