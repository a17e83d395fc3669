"""What ``qk_norm_rope`` accepts; a refusal names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...packing import Rope
    from ...packing.rope import GridPositions

MAX_AXES = 4
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lookup(name: str, value: Any, table: dict[Any, Any]) -> int:
    try:
        return int(table[value])
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {list(table)}, got {value!r}") from None


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {x.dtype}")
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: expected [N, H, D] or [B, L, H, D], got {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got {x.stride()}")


def check_pair(q: Any, k: Any, same_tokens: bool, names: tuple[str, str] = ("q", "k")) -> None:
    q_name, k_name = names
    check_tensor(q_name, q)
    check_tensor(k_name, k)
    if k.dtype != q.dtype:
        raise TypeError(f"{k_name}: expected the dtype of {q_name}, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"{k_name}: expected the device of {q_name}, {q.device}, got {k.device}")
    if k.ndim != q.ndim or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{k_name}: expected the rank and head width of {q_name}, {tuple(q.shape)}, "
            f"got {tuple(k.shape)}"
        )
    if same_tokens and k.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"{k_name}: expected the tokens of {q_name}, {tuple(q.shape[:-2])}, "
            f"got {tuple(k.shape[:-2])}"
        )
    if q.shape[-1] == 0 or q.shape[-1] % 2:
        raise ValueError(f"{q_name}: expected an even head width, got {q.shape[-1]}")


def parameters(
    name: str, given: Any, x: Tensor, norm: str | None, streams: int | None
) -> list[Tensor]:
    """The weights or biases of one side, one for each stream (``streams=None``: not in streams)."""
    if given is None:
        return []
    if norm is None or (name.endswith("bias") and norm != "layer"):
        raise ValueError(f"{name}: expected None with norm={norm!r}, got a value")
    if streams is None:
        found = [given]
    else:
        found = list(given.unbind(0)) if isinstance(given, Tensor) else list(given)
        if len(found) != streams:
            raise ValueError(
                f"{name}: expected one for each of {streams} streams, got {len(found)}"
            )
    width = x.shape[-1] * (x.shape[-2] if norm == "rms_full" else 1)
    for t in found:
        if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a float tensor, got {getattr(t, 'dtype', type(t))}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected the device of q, {x.device}, got {t.device}")
        if t.ndim != 1 or t.shape[0] != width:
            raise ValueError(f"{name}: expected shape [{width}], got {tuple(t.shape)}")
    return found


def check_index(name: str, index: Sequence[Any], lengths: Sequence[int] | int, x: Tensor) -> None:
    """Token numbers of each stream. ``lengths``: of each stream, or (an int) of all together."""
    for s, rows in enumerate(index):
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            got = getattr(rows, "dtype", type(rows).__name__)
            raise TypeError(f"{name}[{s}]: expected an int64 tensor, got {got}")
        if rows.ndim != 1 or not rows.is_contiguous():
            raise ValueError(f"{name}[{s}]: expected one contiguous dimension, got {rows.shape}")
        if rows.device != x.device:
            raise ValueError(
                f"{name}[{s}]: expected the device of q, {x.device}, got {rows.device}"
            )
        if not isinstance(lengths, int) and rows.shape[0] != lengths[s]:
            raise ValueError(f"{name}[{s}]: expected {lengths[s]} tokens, got {rows.shape[0]}")
    if isinstance(lengths, int) and sum(len(rows) for rows in index) != lengths:
        raise ValueError(
            f"{name}: expected every one of {lengths} tokens in one group, "
            f"got {[len(rows) for rows in index]}"
        )


def check_heads(name: str, cos: Tensor, x: Tensor) -> None:
    """Tables per head have as many as ``x``."""
    if cos.ndim == 3 and cos.shape[1] != x.shape[-2]:
        raise ValueError(
            f"{name}.cos: expected one table for each of {x.shape[-2]} heads, got {cos.shape[1]}"
        )


def check_rope(name: str, rope: Rope, x: Tensor, outer: Sequence[int]) -> None:
    """Tables for ``x`` of tokens [N] or [B, L]: all of them, or those of one batch entry."""
    cos, sin, positions, axes = rope.cos, rope.sin, rope.positions, rope.axes
    width = sum(axes)
    if not 1 <= len(axes) <= MAX_AXES or any(a < 0 or a % 2 for a in axes) or width == 0:
        raise ValueError(f"{name}.axes: expected 1 to {MAX_AXES} even sizes, got {tuple(axes)}")
    if width > x.shape[-1]:
        raise ValueError(f"{name}.axes: expected a sum of at most {x.shape[-1]}, got {tuple(axes)}")
    for part, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 and x.dtype != torch.float64:
            raise TypeError(f"{name}.{part}: expected float32, got {table.dtype}")
        if table.ndim not in (2, 3) or table.shape[-1] != width // 2 or table.shape != cos.shape:
            raise ValueError(
                f"{name}.{part}: expected [P, {width // 2}] or [P, H, {width // 2}], "
                f"got {tuple(table.shape)}"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name}.{part}: expected a contiguous tensor, got {table.stride()}")
    check_heads(name, cos, x)
    if isinstance(positions, Tensor):
        index = positions
        if index.ndim != 2 or index.shape[1] not in (1, len(axes)):
            raise ValueError(
                f"{name}.positions: expected [N, 1] or [N, {len(axes)}], got {tuple(index.shape)}"
            )
    else:
        index = positions.part_of_token
        check_parts(name, positions, axes)
    if index.dtype != torch.int32 or not index.is_contiguous():
        raise TypeError(f"{name}.positions: expected contiguous int32, got {index.dtype}")
    tokens = outer[0] if len(outer) == 1 else outer[0] * outer[1]
    if index.shape[0] not in (tokens, outer[-1]):
        raise ValueError(f"{name}: expected {tokens} tokens, got {index.shape[0]}")
    for part, t in (("cos", cos), ("sin", sin), ("positions", index)):
        if t.device != x.device:
            raise ValueError(f"{name}.{part}: expected the device of q, {x.device}, got {t.device}")


def check_parts(name: str, positions: GridPositions, axes: Sequence[int]) -> None:
    """What kernels compute positions from: three axes, and int32 tables of the parts."""
    index, parts = positions.part_of_token, positions.parts
    if len(axes) != 3:
        raise ValueError(f"{name}.axes: expected three with positions of a layout, got {axes}")
    if index.ndim != 1 or parts.ndim != 1 or positions.part_size not in (7, 11):
        raise ValueError(
            f"{name}.positions: expected part_of_token [N], flat parts and part_size 7 or 11, "
            f"got {tuple(index.shape)}, {tuple(parts.shape)} and {positions.part_size}"
        )
    if parts.dtype != torch.int32 or not parts.is_contiguous() or parts.device != index.device:
        raise TypeError(
            f"{name}.positions: expected parts of contiguous int32 on {index.device}, "
            f"got {parts.dtype} on {parts.device}"
        )


def check_k_rope(k_rope: Rope, rope: Rope) -> None:
    """Both sides run the same kernel: their tables may differ in values and length only."""
    positions = _axes_indexed(k_rope), _axes_indexed(rope)
    for part, mine, other in (
        ("axes", tuple(k_rope.axes), tuple(rope.axes)),
        ("cos", k_rope.cos.ndim, rope.cos.ndim),
        ("positions", *positions),
    ):
        if mine != other:
            raise ValueError(f"k_rope.{part}: expected the layout of rope's, {other}, got {mine}")


def _axes_indexed(rope: Rope) -> int:
    """Rows of the tables that a token takes: one, or one for each axis."""
    return rope.positions.shape[1] if isinstance(rope.positions, Tensor) else len(rope.axes)
