"""The table of families: one row per block class of upstream, data only.

A row names the class by its path (nothing of upstream is imported to look it up), the function of a
skeleton that replaces its ``forward``, the sites inside it with the op and the rounding law of
upstream's expression, and the fingerprints of every upstream function that the adapter restates
(several known ones are separated by blanks). ``python -m sora_kernels.families.sources`` prints
those of the installed upstream.

A law is the set of points (:class:`sora_kernels.Point`) at which upstream's expression rounds.
"""

from __future__ import annotations

from ._data_basic import BLOCKS as _BASIC
from ._data_joint import BLOCKS as _JOINT
from ._data_video import BLOCKS as _VIDEO
from ._rows import ABSENT, LAYER, ONCE, STREAM, Block, Points, Processor, Site

__all__ = ["ABSENT", "BLOCKS", "BY_PATH", "LAYER", "ONCE", "STREAM", "Block", "Points", "Processor",
           "Site"]  # fmt: skip

_MODELS = "diffusers.models.transformers"
_NORMS = "diffusers.models.normalization"
_WAN = f"{_MODELS}.transformer_wan"

BLOCKS: tuple[Block, ...] = (
    Block(
        family="Wan",
        path=f"{_WAN}.WanTransformerBlock",
        skeleton="table_cross",
        forward="wan_block",
        survey="wan_survey",
        sites=(
            Site("norm1", "norm_modulate", ONCE),
            Site("attn1+norm2", "gate_residual_norm_modulate", ("residual",)),
            Site("attn1", "gate_residual", ONCE),  # without a norm before the cross-attention
            Site("attn2+norm3", "gate_residual_norm_modulate", ("residual",)),
            Site("ffn", "gate_residual", ONCE),
        ),
        sources={
            f"{_WAN}.WanTransformerBlock.forward": "0585a218c0842272",
            f"{_NORMS}.FP32LayerNorm.forward": "05456a2aa30e1677",
        },
        processors=(
            Processor(
                attention="attn1",
                upstream=f"{_WAN}.WanAttnProcessor",
                ours="wan.FusedWanAttnProcessor",
                site=Site("attn1.qk", "qk_norm_rope", ("affine", "pre_rope")),
                sources={
                    f"{_WAN}.WanAttnProcessor.__call__": "a084ccede676688c",
                    f"{_WAN}._get_qkv_projections": "d712493cf1de7a31",
                },
            ),
        ),
    ),
    *_BASIC,
    *_JOINT,
    *_VIDEO,
)

BY_PATH: dict[str, tuple[Block, ...]] = {
    path: tuple(b for b in BLOCKS if b.path == path) for path in {b.path for b in BLOCKS}
}
