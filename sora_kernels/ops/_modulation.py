"""What the modulated ops share: naming the modulation's granularity, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..rows import RowMap
from ._config import MAX_WIDTH

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRANULARITIES = ("all", "sample", "frame", "token")


def check_tokens(x: Tensor, name: str = "x") -> None:
    """``x`` must be a floating ``[N, D]`` or ``[B, ..., D]`` tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected shape [N, D] or [B, L, D], got {tuple(x.shape)}")


def check_like(tensor: Tensor, name: str, device: torch.device) -> None:
    """A floating tensor on the device of ``x``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} (that of x), got {tensor.device}")


def check_vector(tensor: Tensor | None, name: str, width: int, device: torch.device) -> None:
    """A ``[D]`` vector or None."""
    if tensor is None:
        return
    check_like(tensor, name, device)
    if tensor.shape != (width,):
        raise ValueError(f"{name}: expected shape ({width},), got {tuple(tensor.shape)}")


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself, unless its last dimension is strided (then a copy: kernels need rows)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_tokens(x: Tensor) -> Tensor:
    """``[N, D]`` or ``[B, ..., D]`` as ``[B, L, D]``; a view whenever strides allow one."""
    if x.stride(-1) != 1:
        x = unit_stride(x)
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if x.dim() == 3 else unit_stride(x.flatten(1, -2))


def resolve_rows(x: Tensor, rows: RowMap | None, per: str | None) -> tuple[RowMap, tuple[int, ...]]:
    """The row map that ``rows`` or ``per`` stands for, and the leading shape of a modulation.

    ``per`` names the granularity, it is never guessed from shapes: ``"all"`` one row ``[D]``,
    ``"sample"`` (the default) ``[B, D]``, ``"frame"`` ``[B, F, D]`` with F given by the
    modulation's own shape (see :func:`frame_rows`), ``"token"`` one row per token.
    """
    tokens = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
    if rows is not None:
        if per is not None:
            raise ValueError(f"per: expected None beside rows=, got {per!r}")
        if rows.num_tokens != tokens:
            raise ValueError(f"rows: expected a map of {tokens} tokens, got {rows.num_tokens}")
        if rows.index is not None and rows.index.device != x.device:
            raise ValueError(f"rows: expected device {x.device}, got {rows.index.device}")
        return rows, (rows.num_rows,)
    per = "sample" if per is None else per
    if per not in GRANULARITIES:
        raise ValueError(f"per: expected one of {GRANULARITIES} or None, got {per!r}")
    if per == "all":
        return RowMap.uniform(1, tokens), ()
    if per == "token":
        return RowMap.uniform(tokens, 1), tuple(x.shape[:-1])
    batch = x.shape[0] if x.dim() > 2 else 1
    return _uniform(batch, tokens // max(batch, 1)), (batch,)


_uniform_maps: dict[tuple[int, int], RowMap] = {}


def _uniform(num_rows: int, tokens_per_row: int) -> RowMap:
    """`RowMap.uniform`, remembered: making one takes as long as all checks of a call together."""
    if torch.compiler.is_compiling():  # the numbers may be symbols
        return RowMap.uniform(num_rows, tokens_per_row)
    found = _uniform_maps.get((num_rows, tokens_per_row))
    if found is None:
        if len(_uniform_maps) >= 4096:
            _uniform_maps.clear()
        found = _uniform_maps[num_rows, tokens_per_row] = RowMap.uniform(num_rows, tokens_per_row)
    return found


def frame_rows(x: Tensor, modulations: dict[str, Tensor | None]) -> tuple[RowMap, tuple[int, ...]]:
    """``per="frame"``: F comes from the modulations' own ``[B, F, D]`` shape and must divide L."""
    if x.dim() < 3:
        raise ValueError(f'per: expected x of shape [B, L, D] for "frame", got {tuple(x.shape)}')
    batch, length = x.shape[0], x.shape[1:-1].numel()
    frames = 1
    for name, tensor in modulations.items():
        if tensor is None:
            continue
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected shape [B, F, D], got {tuple(tensor.shape)}")
        frames = tensor.shape[1]
        if frames == 0 or length % frames:
            raise ValueError(f"{name}: expected F to divide L = {length}, got F = {frames}")
    return RowMap.uniform(batch * frames, length // frames), (batch, frames)


def modulation_rows(
    x: Tensor, rows: RowMap | None, per: str | None, modulations: dict[str, Tensor | None]
) -> tuple[RowMap, dict[str, Tensor | None]]:
    """Row map and checked ``[R, D]`` matrices of all modulations of one call."""
    if per == "frame" and rows is None:
        row_map, lead = frame_rows(x, modulations)
    else:
        row_map, lead = resolve_rows(x, rows, per)
    expected = (*lead, x.shape[-1])
    device = x.device
    checked: dict[str, Tensor | None] = {}
    for name, tensor in modulations.items():
        if tensor is not None:
            check_like(tensor, name, device)
            if tensor.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
            if len(expected) != 2:
                tensor = tensor.reshape(row_map.num_rows, expected[-1])
            if tensor.stride(-1) != 1:
                tensor = unit_stride(tensor)
        checked[name] = tensor
    return row_map, checked


def like_stream(out: Tensor, x: Tensor) -> Tensor:
    """A kernel's ``[B, L, D]`` in the shape of ``x``."""
    if x.dim() == 2:
        return out.squeeze(0)  # a sixth of the time of a view with a shape
    return out if x.dim() == 3 else out.view(x.shape)


def output_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """Outputs have the dtype of ``x``; an fp32 residual stream may feed half-precision branches."""
    if out_dtype is None or out_dtype == x.dtype:
        return x.dtype
    if x.dtype is torch.float32 and out_dtype in (torch.bfloat16, torch.float16):
        return out_dtype
    raise ValueError(
        f"out_dtype: expected {x.dtype}"
        + (" or a half precision" if x.dtype is torch.float32 else "")
        + f", got {out_dtype}"
    )


def check_branch(y: Tensor, name: str, x: Tensor) -> None:
    """A branch output added to the residual stream ``x``: its shape; its dtype unless x is fp32."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(y).__name__}")
    if y.dtype != x.dtype and not (
        x.dtype is torch.float32 and y.dtype in (torch.bfloat16, torch.float16)
    ):
        expected = f"{x.dtype}" + (" or a half precision" if x.dtype is torch.float32 else "")
        raise TypeError(f"{name}: expected {expected} (x is {x.dtype}), got {y.dtype}")
    if y.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of x), got {y.device}")


def choose(op: str, x: Tensor, *, whole_rows: bool = True) -> str:
    """The backend of a row-wise op; ``whole_rows``: a kernel must hold a row in registers."""
    chosen = backend.choose(op, x)
    if x.numel() == 0:
        return "reference"
    if chosen == "triton" and whole_rows and x.shape[-1] > MAX_WIDTH:
        return backend.fall_back(op, x, f"a row of {x.shape[-1]} > {MAX_WIDTH} does not fit")
    return chosen


def wants_grad(*tensors: Tensor | None) -> bool:
    """True if autograd must see this call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # a loop: half the time of any() over a generator
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def grad_like(grad: Tensor, of: Tensor | None, need: bool) -> Tensor | None:
    """A kernel's gradient in the dtype of its input, or None if autograd does not ask for it."""
    return grad.to(of.dtype) if need and of is not None else None


def is_own_gradient(dy: Tensor, shift: Tensor | None, table: Tensor | None, rows: RowMap) -> bool:
    """Whether ``dy`` is the gradient of a shift that has a row of its own for every token."""
    return (
        shift is not None
        and table is None
        and rows.tokens_per_row == 1
        and shift.dtype == dy.dtype
        and shift.numel() == dy.numel()
    )


def table_grad(grad: Tensor, table: Tensor | None, need: bool) -> Tensor | None:
    """The gradient of a per-block table: the sum over rows of its modulation's."""
    return grad.sum(0).to(table.dtype) if need and table is not None else None
