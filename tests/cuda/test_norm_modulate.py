"""The CUDA kernels of norm_modulate, run by the emulator, against the fp64 definition.

The source is that of a CUDA build, bindings included; no GPU has a part in it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sora_kernels import RowMap, norm_modulate, use_backend
from tests.cuda_emulator import backwards, emulated, raw
from tests.helpers import randn
from tests.ops.test_norm_modulate import ROW_PATTERNS, compare, make, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
USUAL = ("shift", "scale")
ALL = ("weight", "bias", "shift", "scale", "shift2", "scale2")
TABLES = ("weight", "bias", "shift", "scale", "shift_table", "scale_table")


def agree(arguments: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """The 2x rule (3x for gradients) for the emulated kernels; memory around results is watched."""
    outputs = 2 if {"shift2", "scale2"} & set(arguments) else 1
    with emulated():
        compare("native", arguments, dtype, outputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 64, 100, 1152, 3073])
def test_widths(width: int, dtype: torch.dtype) -> None:
    """Multiples of 8 go 16 bytes at a time, the others one number at a time."""
    agree(make((1, 3, width), (1,), USUAL), dtype)
    agree(make((7, width), (7,), ALL), dtype, per="token", norm="rms")


@pytest.mark.parametrize(
    ("width", "names"),
    [(1032, ALL), (3072, ALL), (3080, ALL), (5120, USUAL), (5128, USUAL), (16392, USUAL)],
)
def test_wide_rows(width: int, names: tuple[str, ...]) -> None:
    """Several elements per thread, blocks of all sizes, and rows that no block can hold."""
    agree(make((2, width), (1,), names), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("names", [TABLES, ("scale",), ("weight",), ("bias", "shift2"), ()])
def test_optional_parts(names: tuple[str, ...], norm: str, dtype: torch.dtype) -> None:
    for width in (40, 41):
        agree(make((3, 11, width), (3,), names), dtype, norm=norm)


@pytest.mark.parametrize("width", [24, 25])
@pytest.mark.parametrize(
    ("per", "shape", "lead"),
    [
        ("all", (70,), ()),
        ("sample", (3, 33), (3,)),
        ("sample", (2, 3, 11), (2,)),
        ("frame", (2, 36), (2, 4)),
        ("token", (2, 5), (2, 5)),
    ],
)
def test_granularities(per: str, shape: tuple[int, ...], lead: tuple[int, ...], width: int) -> None:
    agree(make((*shape, width), lead, TABLES), per=per)


@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_rows(pattern: str) -> None:
    """Rows of 33 tokens span blocks of the backward, which has two stages then."""
    count = 33 if pattern == "a row a token" else 6
    rows = RowMap.from_index(ROW_PATTERNS[pattern](33, count), count)
    for width in (40, 39):
        agree(make((33, width), (count,), TABLES), rows=rows)


def test_many_blocks() -> None:
    agree(make((300, 8), (1,), ("weight", "bias", "shift", "scale")))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_mixed_dtypes(x_dtype: torch.dtype) -> None:
    """Modulations in any dtype beside any x, and an fp32 stream that gives bf16 or fp16."""
    outs = [torch.bfloat16, torch.float16] if x_dtype is torch.float32 else [None]
    for out_dtype in outs:
        for m_dtype in DTYPES:
            for width in (64, 61):
                x = randn(2, 9, width, dtype=x_dtype, seed=4).requires_grad_()
                mods = {n: randn(2, width, dtype=m_dtype, seed=s).requires_grad_()
                        for s, n in enumerate(USUAL)}  # fmt: skip
                upstream = [randn(2, 9, width, dtype=out_dtype or x_dtype, seed=9)]
                arguments = {"x": x, **mods}
                with use_backend("native"):
                    cpu = run(arguments, upstream, out_dtype=out_dtype)
                with emulated():
                    got = run(arguments, upstream, out_dtype=out_dtype)
                for key, value in got.items():
                    assert value.dtype == cpu[key].dtype, key
                    half = value.dtype is not torch.float32
                    tolerance = 2 * torch.finfo(value.dtype).eps if half else 1e-5
                    torch.testing.assert_close(
                        value, cpu[key], atol=tolerance, rtol=tolerance, msg=key
                    )


def test_strided_inputs_and_expanded_gradients() -> None:
    """Misaligned views are read as they are; nothing beside them is read."""
    frame = torch.full((3, 9, 2 * 48 + 1), float("nan"))
    for offset in (0, 1, 4):
        view = frame[:, 1:8, offset : offset + 48]
        view.copy_(randn(3, 7, 48, seed=3))
        arguments = {"x": view.detach().requires_grad_()}
        arguments |= dict(zip(USUAL, randn(3, 6 * 48, seed=4).chunk(6, -1)[2:4], strict=True))
        for upstream in (torch.ones(()).expand(3, 7, 48), randn(48, seed=8).expand(3, 7, 48)):
            with use_backend("native"):
                cpu = run(arguments, [upstream])
            with emulated():
                got = run(arguments, [upstream])
            for key, value in got.items():
                torch.testing.assert_close(value, cpu[key], atol=1e-5, rtol=1e-5, msg=key)
        frame.fill_(float("nan"))


def test_offsets_need_64_bits() -> None:
    """Rows 2^30 elements apart; of the memory between, none is ever touched."""
    width, apart = 64, 1 << 30
    memory = torch.empty(2 * apart + width, dtype=torch.float16)
    x = memory.as_strided((1, 3, width), (3 * apart, apart, 1))
    x.copy_(randn(1, 3, width, dtype=torch.float16))
    arguments = make((1, 3, width), (1,), USUAL) | {"x": x}
    arguments = {k: v.detach().half() if k != "x" else x for k, v in arguments.items()}
    with emulated():
        got = norm_modulate(**arguments)
    with use_backend("reference"):
        expected = norm_modulate(**(arguments | {"x": x.contiguous()}))
    torch.testing.assert_close(got, expected)


def exact_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Small integers, each with its negative: fp32 sums of them are exact in any order."""
    half = torch.randint(-8, 9, (rows, width // 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, -half.flip(1)], dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", ["fp32_once", "torch", "diffusers_rms", ("one_plus", "table")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_laws_have_the_bits_of_the_cpu(norm: str, law: Any, dtype: torch.dtype) -> None:
    """Where sums are exact, every bit of the output is that of the C++ kernels."""
    for width in (96, 90):
        x = exact_rows(9, width, dtype)
        tensors = {n: randn(width, dtype=dtype, seed=i) for i, n in enumerate(TABLES)}
        options: dict[str, Any] = {"norm": norm, "law": law, "per": "all"}
        with use_backend("native"):
            cpu = norm_modulate(x, **tensors, **options)
        with emulated():
            got = norm_modulate(x, **tensors, **options)
        assert torch.equal(got, cpu)


@pytest.mark.parametrize("law", ["torch", "diffusers_rms"])
def test_gradients_follow_the_law(law: str) -> None:
    agree(make((2, 9, 72), (2,), TABLES), torch.float16, law=law)


@pytest.mark.parametrize("width", [1152, 99])
def test_the_order_of_threads_changes_no_bit(width: int) -> None:
    index = ROW_PATTERNS["shuffled"](11, 4)
    arguments = make((11, width), (4,), ALL)
    upstream = [randn(11, width, seed=i) for i in range(2)]
    rows = RowMap.from_index(index, 4)
    with emulated():
        forth = run(arguments, upstream, rows=rows)
        with backwards():
            back = run(arguments, upstream, rows=rows)
    assert all(torch.equal(forth[k], back[k]) for k in forth)


@pytest.mark.parametrize("width", [16, 7, 0])
def test_no_tokens(width: int) -> None:
    """Empty outputs, and gradients of modulations and weights that are zero, not unwritten."""
    x, row = torch.empty(1, 0, width), torch.zeros(2, width)
    index = torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(3, dtype=torch.int32)
    vector = torch.ones(width)
    tensors = (vector, vector, row, row, None, None, None, None, index)
    y, _, mean, rstd = raw("norm_modulate", "fwd")(x, *tensors, 0, 1e-6, False, 0, torch.float32)
    assert y.shape == x.shape
    grads = raw("norm_modulate", "bwd")(
        x, None, x, mean, rstd, *tensors, None, offsets, 0, False, 0, 31
    )
    assert grads[0].shape == x.shape
    for grad, of in zip(grads[1:5], (vector, vector, row, row), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_bad_raw_arguments_are_named() -> None:
    x = randn(1, 4, 16)
    none = (None,) * 9
    with pytest.raises(RuntimeError, match=r"shift: expected shape \[R, 16\]"):
        raw("norm_modulate", "fwd")(
            x, None, None, randn(1, 8), *none[:6], 4, 1e-6, False, 0, torch.float32
        )
    with pytest.raises(RuntimeError, match="x: expected stride 1"):
        raw("norm_modulate", "fwd")(x.transpose(1, 2), *none, 4, 1e-6, False, 0, torch.float32)
    with pytest.raises(RuntimeError, match="out_dtype: expected that of x"):
        raw("norm_modulate", "fwd")(x.half(), *none, 4, 1e-6, False, 0, torch.float32)
