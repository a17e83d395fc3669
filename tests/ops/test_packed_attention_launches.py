"""How the attention kernels are launched: strides as Triton can use them, order, device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import sora_kernels
from sora_kernels.ops.packed_attention import aot_cases as dense_cases
from sora_kernels.ops.packed_attention import kernels, kernels_bwd
from sora_kernels.ops.packed_attention.config import Launch, choose_config, forced_descriptors
from sora_kernels.ops.packed_attention.descriptors import describe
from sora_kernels.ops.packed_attention.kernels import _first_query, in_steps, options
from sora_kernels.ops.windowed_attention import aot_cases as windowed_cases
from sora_kernels.ops.windowed_attention import kernels as windowed
from sora_kernels.ops.windowed_attention import kernels_bwd as windowed_bwd

KERNELS = (
    kernels._packed_attention_fwd_kernel,
    kernels_bwd._packed_attention_bwd_kernel_delta,
    kernels_bwd._packed_attention_bwd_kernel_dq,
    kernels_bwd._packed_attention_bwd_kernel_dkv,
    windowed._windowed_attention_fwd_kernel,
    windowed_bwd._windowed_attention_bwd_kernel_dq,
    windowed_bwd._windowed_attention_bwd_kernel_dkv,
)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "expected"),
    [
        ((9, 4, 72), (864, 72, 1), torch.bfloat16, (8, [108, 9])),  # heads of 144 bytes
        ((9, 4, 72), (864, 72, 1), torch.float32, (4, [216, 18])),
        ((9, 4, 100), (400, 100, 1), torch.bfloat16, (1, [400, 100])),  # heads of 200 bytes
        ((9, 4, 64), (0, 64, 1), torch.bfloat16, (8, [0, 8])),
        ((9, 4, 64), (64, 2**31, 1), torch.bfloat16, (1, [64, 2**31])),  # not by 32 bits
    ],
)
def test_strides_in_steps_of_16_bytes(
    shape: Any, strides: Any, dtype: torch.dtype, expected: Any
) -> None:
    x = torch.empty(0, dtype=dtype, device="meta").as_strided(shape, strides)
    assert in_steps(x) == expected


def test_one_tensor_that_has_no_steps_leaves_all_in_elements() -> None:
    even, odd = torch.empty(4, 2, 64), torch.empty(4, 2, 65)[..., :64]
    assert in_steps(even, odd) == (1, [128, 64, 130, 65])


def test_no_number_that_varies_makes_another_kernel() -> None:
    """Triton compiles anew when an integer becomes 1 or divisible by 16, unless it is told not to;
    so what it sees of a number on a GPU is also all that the cross-compiler may be told."""
    for kernel in KERNELS:
        numbers = {
            name
            for name in kernel.arg_names
            if name.startswith(("stride_", "num_", "back_", "ahead_"))
            or name in ("heads", "group_size", "causal", "clamp", "sink")
        }
        assert numbers <= set(kernel.kwargs["do_not_specialize"]), kernel
    for case in [*dense_cases.aot_cases(), *windowed_cases.aot_cases()]:
        assert all(name.endswith("_ptr") for name in case.divisible)


def test_stages_are_fewer_only_where_a_launch_for_descriptors_reads_by_pointers() -> None:
    hopper = Launch(128, 128, 8, 3, descriptors=True)
    assert (hopper.stages(True), hopper.stages(False)) == (3, 2)
    assert hopper._replace(num_stages=1).stages(False) == 1
    assert hopper._replace(pointer_stages=1).stages(False) == 1
    assert Launch(128, 64, 8, 3).stages(False) == 3
    aligned = torch.zeros(8, 2, 64)
    for on, stages in ((True, 3), (False, 2)):
        with forced_descriptors(on):
            found = describe(hopper, choose_config(64, torch.half, (9, 0)), (128,), aligned)
        assert options(hopper, found)["num_stages"] == stages


@triton.jit
def _order(out_ptr, len_q, causal, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    tl.store(out_ptr + block, _first_query(block, len_q, causal, BLOCK))


@pytest.mark.parametrize(
    ("length", "causal", "expected"),
    [
        (40, 0, [0, 16, 32, -1]),
        (40, 1, [32, 16, 0, -1]),
        (48, 1, [32, 16, 0, -1]),
        (0, 0, [-1] * 4),
        (0, 1, [-1] * 4),
    ],
)
def test_the_dearest_blocks_of_a_causal_segment_come_first(
    length: int, causal: int, expected: list[int]
) -> None:
    out = torch.empty(4, dtype=torch.int32)
    _order[(4,)](out, length, causal, BLOCK=16)
    assert out.tolist() == expected


@pytest.mark.parametrize("op", ["packed_attention", "windowed_attention"])
def test_every_kernel_runs_on_the_device_of_its_tensors(op: str) -> None:
    """Triton itself launches on the current device, whatever the tensors lie on."""
    folder = Path(sora_kernels.__file__).parent / "ops" / op
    for path in folder.glob("*.py"):
        assert not re.search(r"\w\[[^\]]*\]\(\s*\n", path.read_text()), path
