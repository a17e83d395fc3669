"""What the gate times of this project itself: every op, forward and backward, on our side alone.

Prints `{"op/mode/shape": [milliseconds, ...]}`. `python -m benchmarks gate` runs it in two
checkouts, call by call in turn. On a CPU the calls are of a millisecond or so, which fit between
two interruptions, and all cases are timed in turn again and again. One thread, unless
OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

from .pinned import pin

SWEEPS = 4
ROUNDS = 12
"""Of a case in one sweep; fixed, so that both checkouts time the same case at the same time."""

Cases = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def cases(device: str) -> Cases:
    """op -> how it is called, and the tensors it is called with, which are differentiated.

    Widths of DiT-XL; on a GPU enough tokens to fill it.
    """
    import torch

    from sora_kernels import (
        PackedLayout,
        RowMap,
        Window,
        bias_gelu,
        causal_conv_pad,
        gate_residual,
        gate_residual_norm_modulate,
        guided_step,
        norm_modulate,
        norm_silu,
        packed_attention,
        patchify,
        qk_norm_rope,
    )

    dtype, scale = (torch.bfloat16, 8) if device == "cuda" else (torch.float32, 1)
    t, h, w = 4, 8 * scale, 16 * scale
    tokens, width = t * h * w, 1152
    packed = PackedLayout.from_grids(
        [(t // 2, h, w), (t // 2, h, w)], patch=(1, 1, 1), device=device
    )
    tiles = PackedLayout.from_grids(
        [(t, 2 * h, 2 * w)], patch=(1, 2, 2), order="tile", device=device
    )
    rows = RowMap.uniform(8, tokens // 8)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    def video(channels: int, frames: int) -> torch.Tensor:
        x = randn(1, channels, frames, 4 * h, 2 * w)
        return x.contiguous(memory_format=torch.channels_last_3d)

    x, y = randn(2, tokens, width)
    shift, factor, gate = randn(3, 8, width)
    q, k, _ = randn(tokens, 3, 16, 72).unbind(1)
    attended = randn(tokens, 3, 2 * scale, 64).unbind(1)
    latents = randn(3, 4, 16, t, 4 * h, 4 * w)
    rope = packed.rope((24, 24, 24))
    step = partial(guided_step, dt=torch.full((4,), -0.05, device=device), guidance=6.0)
    return {
        "bias_gelu": (bias_gelu, (x, randn(width))),
        "causal_conv_pad": (
            partial(causal_conv_pad, pad_t=2, pad_h=1, pad_w=1), (video(96, 4), video(96, 2))
        ),
        "gate_residual": (partial(gate_residual, rows=rows), (x, y, gate)),
        "gate_residual_norm_modulate": (
            partial(gate_residual_norm_modulate, rows=rows), (x, y, gate, shift, factor)
        ),
        "guided_step": (step, (latents[0].float(), latents[1], latents[2])),
        "norm_modulate": (partial(norm_modulate, rows=rows), (x, shift, factor)),
        "norm_silu": (partial(norm_silu, norm="rms"), (video(96, 4), randn(96))),
        "packed_attention": (lambda q, k, v: packed_attention(q, k, v, packed), attended),
        "patchify": (lambda video: patchify([video], tiles), (randn(16, t, 2 * h, 2 * w),)),
        "qk_norm_rope": (
            lambda q, k, a, b: qk_norm_rope(q, k, a, b, rope), (q, k, randn(72), randn(72))
        ),
        "windowed_attention": (
            lambda q, k, v: packed_attention(q, k, v, tiles, window=Window((1, 1, 3))), attended
        ),
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    import torch

    from sora_kernels.bench import measure, measure_cuda

    from .registry import backward, forward

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = {}
    for op, (function, tensors) in cases(device).items():
        named = {f"arg{number}": tensor for number, tensor in enumerate(tensors)}
        call = lambda function=function, **named: function(*named.values())  # noqa: E731
        shape = "x".join(map(str, tensors[0].shape))  # another size is another name
        runs[f"{op}/fwd/{shape}"] = forward(call)(named)
        runs[f"{op}/bwd/{shape}"] = backward(call, tuple(named))(named)
    if argv:
        runs = {name: run for name, run in runs.items() if fnmatch(name, argv[0])}
    timer = measure_cuda if device == "cuda" else measure
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(SWEEPS):
        for name, run in runs.items():
            found[name] += timer({name: run}, min_rounds=ROUNDS, max_rounds=ROUNDS)[name]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    pin(sys.argv[1:], "benchmarks.gate_cases")
    sys.exit(main(sys.argv[1:]))
