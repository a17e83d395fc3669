"""Rounding laws: at which points of a fused op a value is rounded to the storage dtype.

Plain PyTorch rounds after every operator; a fused kernel need not. Neither is "right": models were
trained with one of them, and mixing them up costs image quality (10 dB and more have been
reported). So the law is explicit. A law is a set of :class:`Point`; ``fp32_once`` is the empty set:
everything in fp32, one rounding when the result is stored.

The backward differentiates the law's expression with every rounding treated as the identity
(straight-through): it recomputes the same rounded intermediates and rounds each gradient once.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntFlag


class Point(IntFlag):
    """Where a rounding to the dtype of ``x`` happens, in the order of evaluation."""

    XHAT = 1  # (x - mean) * rstd
    AFFINE = 2  # xhat * weight + bias, after both
    TABLE = 4  # modulation + table
    ONE_PLUS = 8  # 1 + scale
    PRODUCT = 16  # (1 + scale) * norm
    SUM = 32  # ... + shift
    TANH = 64  # tanh(gate)
    GATED = 128  # gate * y
    RESIDUAL = 256  # x + gated; the norm that follows then reads the rounded residual
    PRE_ROPE = 512  # normed q/k before the rotation
    ROPE = 1024  # a rotation in the storage dtype: cos, sin and each product of it


Law = str | int | Iterable[str]

PRESETS: dict[str, Point] = {
    "fp32_once": Point(0),
    # F.layer_norm / F.rms_norm round once after the affine part; then every operator rounds.
    "torch": Point.AFFINE
    | Point.TABLE
    | Point.ONE_PLUS
    | Point.PRODUCT
    | Point.SUM
    | Point.TANH
    | Point.GATED
    | Point.RESIDUAL
    | Point.PRE_ROPE,
}
# diffusers' RMSNorm and LlamaRMSNorm round xhat to the storage dtype before the weight. Every
# rotary embedding of diffusers multiplies in fp32; the one of Llama in the storage dtype.
PRESETS["diffusers_rms"] = PRESETS["torch"] | Point.XHAT
PRESETS["llama_rms"] = PRESETS["torch"] | Point.XHAT | Point.ROPE


def resolve(law: Law) -> int:
    """The bit mask of a law given by preset name, by mask, or by the names of its points.

    Raises:
        ValueError: unknown preset or point.
    """
    if law == "fp32_once":
        return 0
    if isinstance(law, int):
        if law < 0 or law >= 2 * Point.ROPE:
            raise ValueError(f"law: expected a mask of Point flags, got {law}")
        return int(law)
    if isinstance(law, str):
        if law not in PRESETS:
            raise ValueError(f"law: expected one of {sorted(PRESETS)}, got {law!r}")
        return int(PRESETS[law])
    mask = 0
    for name in law:
        try:
            mask |= Point[name.upper()]
        except KeyError:
            known = [p.name.lower() for p in Point if p.name]
            raise ValueError(f"law: expected points out of {known}, got {name!r}") from None
    return int(mask)
