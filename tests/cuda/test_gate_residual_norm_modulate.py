"""The CUDA kernels of gate_residual_norm_modulate, run by the emulator, against the definition.

The source is that of a CUDA build, bindings included; no GPU has a part in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import gate_residual_norm_modulate as fused
from sora_kernels import use_backend
from tests.cuda.test_norm_modulate import exact_rows
from tests.cuda_emulator import backwards, emulated, raw
from tests.helpers import randn
from tests.ops.gated import DTYPES, GRANULARITIES, ROW_PATTERNS, compare, make, map_of, run, to

USUAL = "y gate shift scale"
ALL = "y gate y2 gate2 shift scale weight bias"
TABLES = "y gate shift scale gate_table shift_table scale_table weight"
BOTH = (True, True)
FP32 = (torch.float32, torch.float32)


def agree(
    arguments: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype] = FP32,
    used: tuple[bool, ...] = BOTH,
    **options: Any,
) -> None:
    """The 2x rule (3x for gradients) for the emulated kernels; memory around results is watched."""
    with emulated():
        compare(fused, "native", arguments, dtypes, used=used, **options)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 64, 100, 1152])
def test_widths(width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Multiples of 8 go 16 bytes at a time, the others one number at a time."""
    agree(make((1, 3, width), (1,), USUAL), dtypes)
    agree(make((7, width), (7,), ALL), dtypes, per="token", norm="rms")


@pytest.mark.parametrize(
    ("width", "names"),
    [(1032, ALL), (3072, ALL), (3073, USUAL), (3080, ALL), (5120, USUAL), (5128, USUAL),
     (8200, "y gate scale")],
)  # fmt: skip
def test_wide_rows(width: int, names: str) -> None:
    """Several elements per thread, blocks of all sizes, and rows that no block can hold."""
    agree(make((2, width), (1,), names), (torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("names", ["y", "y gate", "y scale", "y y2 gate2", "y gate weight", TABLES])
def test_optional_parts(names: str) -> None:
    for norm in ("layer", "rms"):
        for width in (40, 41):
            agree(make((3, 11, width), (3,), names), norm=norm)


@pytest.mark.parametrize("branch", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 61])
def test_mixed_dtypes(width: int, branch: torch.dtype) -> None:
    """An fp32 stream whose normed output stays fp32; modulations in fp32 beside half branches."""
    upstream: list[Tensor | None] = [randn(2, 9, width, seed=i) for i in range(2)]
    for modulations in (torch.float32, branch):
        arguments = to(make((2, 9, width), (2,), ALL), torch.float32, modulations)
        for name in ("y", "y2"):
            arguments[name] = arguments[name].detach().to(branch).requires_grad_()
        for out_dtype in (torch.float32, branch):
            with use_backend("native"):
                cpu = run(fused, arguments, upstream, out_dtype=out_dtype)
            with emulated():
                got = run(fused, arguments, upstream, out_dtype=out_dtype)
            for key, value in got.items():
                assert value.dtype == cpu[key].dtype, key
                half = value.dtype is not torch.float32
                tolerance = 2 * torch.finfo(value.dtype).eps if half else 2e-5
                torch.testing.assert_close(value, cpu[key], atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.parametrize(("per", "shape", "lead"), GRANULARITIES)
def test_granularities(per: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    agree(make(shape, lead, TABLES), per=per)
    agree(make((*shape[:-1], 9), lead, TABLES), per=per)


@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_rows(pattern: str) -> None:
    """Rows of 33 tokens span blocks of the backward, which has two stages then."""
    count = 33 if pattern == "a row a token" else 6
    for width in (40, 39):
        agree(make((33, width), (count,), ALL), rows=map_of(pattern, 33, count))


@pytest.mark.parametrize("width", [24, 23])
@pytest.mark.parametrize("used", [(True, True), (False, True)])
def test_unused_residual(used: tuple[bool, ...], width: int) -> None:
    agree(make((2, 7, width), (2,), ALL), used=used)


@pytest.mark.parametrize("width", [24, 23])
@pytest.mark.parametrize("wanted", ["x", "y", "gate", "scale", "shift weight", "gate2 y2"])
def test_only_wanted_gradients_with_the_same_bits(wanted: str, width: int) -> None:
    full = make((2, 6, width), (2,), ALL)
    upstream: Iterable[Tensor] = [randn(2, 6, width, seed=i) for i in range(2)]
    with emulated():
        everything = run(fused, full, list(upstream))
        some = {k: v.detach().requires_grad_(k in wanted.split()) for k, v in full.items()}
        got = run(fused, some, list(upstream))
    # What is kept for the backward differs, and with it the bits of xhat, unless a gate is wanted.
    exact = "gate" in wanted
    for key, value in got.items():
        if exact or key.startswith("out"):
            assert torch.equal(value, everything[key]), key
        else:
            torch.testing.assert_close(value, everything[key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("law", ["fp32_once", "torch", "diffusers_rms", ("gated", "residual")])
def test_laws_have_the_bits_of_the_cpu(law: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Where sums are exact, every bit of both outputs is that of the C++ kernels."""
    stream, branch = dtypes
    for width in (96, 90):
        x, y = (exact_rows(9, width, d) for d in dtypes)
        row = torch.full((width,), 0.5, dtype=branch)
        tensors = {n: randn(width, dtype=branch, seed=i) for i, n in enumerate(("shift", "scale"))}
        options: dict[str, Any] = {"law": law, "per": "all", "weight": tensors["shift"]}
        for norm in ("layer", "rms"):
            with use_backend("native"):
                cpu = fused(x, y, row, **tensors, y2=y, gate2=row, norm=norm, **options)
            with emulated():
                got = fused(x, y, row, **tensors, y2=y, gate2=row, norm=norm, **options)
            assert torch.equal(got[0], cpu[0]) and torch.equal(got[1], cpu[1])
            assert got[0].dtype == stream and got[1].dtype == branch


@pytest.mark.parametrize("law", ["torch", "diffusers_rms"])
def test_gradients_follow_the_law(law: str) -> None:
    for width in (72, 71):
        agree(make((2, 9, width), (2,), TABLES), (torch.float16, torch.float16), law=law)


def test_strided_inputs() -> None:
    """Views with an odd offset, an expanded upstream gradient: read as they are."""
    frame = torch.full((2, 3, 9, 97), float("nan"))
    view = frame[:, :, 1:8, 1:49]
    view.copy_(randn(2, 3, 7, 48))
    x, y = (t.detach().requires_grad_() for t in view)
    gate, shift, scale = (m.requires_grad_() for m in randn(3, 3 * 48, seed=4).chunk(3, -1))
    arguments = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    upstream = [torch.ones(()).expand(3, 7, 48), randn(48, seed=8).expand(3, 7, 48)]
    with use_backend("native"):
        cpu = run(fused, arguments, list(upstream))
    with emulated():
        got = run(fused, arguments, list(upstream))
    for key, value in got.items():
        torch.testing.assert_close(value, cpu[key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("width", [1152, 99])
def test_the_order_of_threads_changes_no_bit(width: int) -> None:
    arguments = make((9, width), (4,), ALL)
    upstream: list[Tensor | None] = [randn(9, width, seed=i) for i in range(2)]
    rows = map_of("shuffled", 9, 4)
    with emulated():
        forth = run(fused, arguments, upstream, rows=rows)
        with backwards():
            back = run(fused, arguments, upstream, rows=rows)
    assert all(torch.equal(forth[k], back[k]) for k in forth)


@pytest.mark.parametrize("width", [16, 7])
def test_no_tokens(width: int) -> None:
    """Gradients of modulations and weights are zero then, not unwritten."""
    x, row, vector = torch.empty(1, 0, width), torch.zeros(2, width), torch.ones(width)
    index, offsets = torch.empty(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    tensors = (row, row, vector, vector, row, row, None, None, None, index)
    op = "gate_residual_norm_modulate"
    residual, normed, mean, rstd = raw(op, "fwd")(
        x, x, x, *tensors, 0, 1e-6, False, 0, torch.float32
    )
    assert residual.shape == normed.shape == x.shape
    grads = raw(op, "bwd")(
        None, x, x, x, x, mean, rstd, *tensors, None, offsets, 0, False, 0, torch.float32, 511
    )
    for grad, of in zip(grads[3:], (row, row, vector, vector, row, row), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))
