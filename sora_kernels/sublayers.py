"""The two halves of a DiT block as single calls that keep little for the backward.

A DiT block (Peebles & Xie, arXiv 2212.09748) is norm, modulate, attention or MLP, gate, residual,
twice. Here each half runs the package's ops and the caller's own projections, and what is cheap to
compute again (the modulated norm, the rotated q and k, the activation) is not kept for the
backward: half of what autograd would hold. Gradients are the same bits, because a recomputed
tensor is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .laws import Law, Point, resolve
from .ops.bias_gelu import bias_gelu
from .ops.gate_residual import gate_residual
from .ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from .ops.norm_modulate import norm_modulate
from .ops.packed_attention import packed_attention
from .ops.qk_norm_rope import qk_norm_rope
from .rows import RowMap

if TYPE_CHECKING:
    from .packing import PackedLayout, Rope

__all__ = ["adaln_attention", "adaln_mlp"]

Projection = Callable[[Tensor], Tensor]
Modulation = tuple[Tensor | None, Tensor | None, Tensor | None]
NextModulation = tuple[Tensor | None, Tensor | None]


def adaln_attention(
    x: Tensor,
    modulation: Modulation,
    qkv: Projection,
    out: Projection,
    layout: PackedLayout,
    rope: Rope | None = None,
    *,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rows: RowMap | None = None,
    per: str | None = None,
    normed: Tensor | None = None,
    next_modulation: NextModulation | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    qk_norm: str | None = "rms",
    qk_eps: float = 1e-6,
    pairing: str = "interleaved",
    softmax_scale: float | None = None,
    window: Any = None,
    law: Law = "fp32_once",
    recompute: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x + gate * out(attention(qkv((1 + scale) * norm(x) + shift)))`` on a packed sequence.

    The projections are called, never looked into: an ``nn.Linear``, one with LoRA, a quantised or
    sharded one. Blocks chain without a norm of their own: with ``next_modulation`` the last pass
    also computes the modulated norm of the next half, which takes it as ``normed``.

    Args:
        x: the residual stream, ``[N, D]``.
        modulation: ``(shift, scale, gate)``, in the shapes that ``rows`` or ``per`` name; each may
            be None, as in ``norm_modulate`` and ``gate_residual``.
        qkv: ``[N, D]`` to ``[N, 3 * heads * head_dim]``: q, k and v of all heads in this order.
        out: ``[N, heads * head_dim]`` to ``[N, D]``.
        layout: the pack; attention stays within its segments.
        rope: rotary tables, or None.
        heads: attention heads.
        q_weight, k_weight: of the q/k norm, ``[head_dim]`` (``[heads * head_dim]`` for
            ``"rms_full"``).
        normed: ``(1 + scale) * norm(x) + shift``, if the caller has it. In half precision it is
            then kept, unless ``law`` rounds the residual before its norm: it was computed from
            the sum before rounding, and would not come out the same again.
        next_modulation: ``(shift, scale)`` of the half that follows.
        norm, eps: of the stream's norm.
        qk_norm, qk_eps, pairing: ``norm``, ``eps`` and ``pairing`` of ``qk_norm_rope``.
        softmax_scale, window: of ``packed_attention``.
        law: rounding law of every op.
        recompute: compute the modulated norm and the rotated q, k again in the backward. Without
            effect under torch.compile, which does not support the hooks this takes.

    Returns:
        The new stream ``[N, D]``; with ``next_modulation`` also its modulated norm ``[N, D]``.

    Raises:
        TypeError, ValueError: as the ops; or ``qkv`` returns another width than expected.
    """
    shift, scale, gate = modulation
    modulated = _modulated_norm(x, shift, scale, normed, rows, per, norm, eps, law)
    with _Recomputed(recompute) as again:
        h = modulated() if normed is None else normed
        if normed is None or _same_bits(x, law):
            again.later(modulated, h)
        projected = qkv(h)
        if projected.shape[-1] % (3 * heads):
            raise ValueError(
                f"qkv: expected a width of 3 x {heads} heads, got {projected.shape[-1]}"
            )
        q, k, v = projected.view(x.shape[0], 3, heads, -1).unbind(1)

        def rotated() -> tuple[Tensor, Tensor]:
            return qk_norm_rope(
                q, k, q_weight, k_weight, rope, norm=qk_norm, eps=qk_eps, pairing=pairing, law=law
            )

        q_rotated, k_rotated = rotated()
        again.later(rotated, q_rotated, k_rotated)
        options = {} if window is None else {"window": window}
        attended = packed_attention(
            q_rotated, k_rotated, v, layout, softmax_scale=softmax_scale, **options
        )
        y = out(cast(Tensor, attended).flatten(1))
        return _join(x, y, gate, next_modulation, rows, per, norm, eps, law)


def adaln_mlp(
    x: Tensor,
    modulation: Modulation,
    up: Projection,
    down: Projection,
    *,
    activation: Projection = bias_gelu,
    rows: RowMap | None = None,
    per: str | None = None,
    normed: Tensor | None = None,
    next_modulation: NextModulation | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    law: Law = "fp32_once",
    recompute: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x + gate * down(activation(up((1 + scale) * norm(x) + shift)))``, tokenwise.

    Args:
        x, modulation, rows, per, normed, next_modulation, norm, eps, law: as `adaln_attention`.
        up: ``[N, D]`` to the hidden width (twice that for a gated activation).
        down: from the hidden width to ``[N, D]``.
        activation: runs again in the backward, so it must be deterministic. ``partial(bias_gelu,
            bias=b)`` adds the bias of an ``up`` without one in its pass.
        recompute: compute the modulated norm and the activation again in the backward.

    Returns:
        As `adaln_attention`.

    Raises:
        TypeError, ValueError: as the ops.
    """
    shift, scale, gate = modulation
    modulated = _modulated_norm(x, shift, scale, normed, rows, per, norm, eps, law)
    with _Recomputed(recompute) as again:
        h = modulated() if normed is None else normed
        if normed is None or _same_bits(x, law):
            again.later(modulated, h)
        hidden = up(h)

        def activated() -> Tensor:
            return activation(hidden)

        a = activated()
        again.later(activated, a)
        return _join(x, down(a), gate, next_modulation, rows, per, norm, eps, law)


def _modulated_norm(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, normed: Tensor | None,
    rows: RowMap | None, per: str | None, norm: str, eps: float, law: Law,
) -> Callable[[], Tensor]:  # fmt: skip
    """Computes the modulated norm, in the dtype of ``normed`` if that is what it replaces."""
    out_dtype = x.dtype if normed is None else normed.dtype

    def run() -> Tensor:
        h = norm_modulate(
            x, shift, scale, rows=rows, per=per, norm=norm, eps=eps, law=law, out_dtype=out_dtype
        )
        return cast(Tensor, h)

    return run


def _same_bits(x: Tensor, law: Law) -> bool:
    """Whether `norm_modulate` of the stream gives what `gate_residual_norm_modulate` gave.

    That one normalises the sum before it is rounded to the stream's dtype, unless the law rounds
    it there.
    """
    return x.dtype in (torch.float32, torch.float64) or bool(resolve(law) & Point.RESIDUAL)


def _join(
    x: Tensor, y: Tensor, gate: Tensor | None, following: NextModulation | None,
    rows: RowMap | None, per: str | None, norm: str, eps: float, law: Law,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gate and residual, and the norm that comes next if there is one."""
    if following is None:
        return gate_residual(x, y, gate, rows=rows, per=per, law=law)
    return gate_residual_norm_modulate(
        x, y, gate, *following, rows=rows, per=per, norm=norm, eps=eps, law=law
    )


class _Again:
    """A computation that runs when the first of its results is asked for, without gradients.

    The results are let go with the last of the requests that autograd announced, so that nothing
    lives longer than its use; a backward that runs twice (``retain_graph``) computes them twice.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.announced = 0
        self.served = 0
        self.results: tuple[Tensor, ...] = ()

    def take(self, number: int) -> Tensor:
        if not self.results:
            with torch.no_grad():
                made = self.run()
            self.results = (made,) if isinstance(made, Tensor) else made
        result = self.results[number]
        self.served += 1
        if self.served == self.announced:
            self.served, self.results = 0, ()
        return result


class _Recomputed:
    """Within this context autograd keeps how to compute the named tensors, not the tensors.

    They are known by their storage, since an op may save a view. They stay alive until the context
    ends, so that no other tensor can take their address. Hooks of the caller (offloading to the
    CPU) still get all other tensors.
    """

    outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None

    def __init__(self, active: bool) -> None:
        self.active = active and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.known: dict[int, tuple[Tensor, _Again, int]] = {}

    def later(self, run: Callable[[], Any], *results: Tensor) -> None:
        """``run()`` gives ``results`` again, bit for bit."""
        if self.active:
            again = _Again(run)
            for number, tensor in enumerate(results):
                self.known[tensor.untyped_storage().data_ptr()] = (tensor, again, number)

    def _pack(self, tensor: Tensor) -> Any:
        found = self.known.get(tensor.untyped_storage().data_ptr())
        if found is None and self.outer is not None:
            return self.outer[1], self.outer[0](tensor)
        if found is None:
            return None, (tensor, tensor._version)
        _, again, number = found
        again.announced += 1
        return again, number, (tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if len(packed) == 3:
            again, number, geometry = packed
            return cast(Tensor, again.take(number).as_strided(*geometry))
        unpack, kept = packed
        if unpack is not None:
            return cast(Tensor, unpack(kept))
        tensor, version = kept
        if tensor._version != version:  # autograd leaves this check to those who hook into it
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {list(tensor.shape)} is at version {tensor._version}, "
                f"expected {version}"
            )
        return cast(Tensor, tensor)

    def __enter__(self) -> _Recomputed:
        if self.active:
            # Only the innermost hooks are called: what they do not know goes to those around them.
            self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        if self.active:
            self.hooks.__exit__()
            self.known.clear()
