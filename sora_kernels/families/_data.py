"""The table of families: one row per block class of upstream, data only.

A row names the class by its path (nothing of upstream is imported to look it up), the function of a
skeleton that replaces its ``forward``, the sites inside it with the op and the rounding law of
upstream's expression, and the fingerprints of every upstream function that the adapter restates
(several known ones are separated by blanks). ``python -m sora_kernels.families.sources`` prints
those of the installed upstream.

A law is the set of points (:class:`sora_kernels.Point`) at which upstream's expression rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Points = tuple[str, ...]

ONCE: Points = ()
#: `F.layer_norm(x)`, then `(1 + scale) * ... + shift` with an operator each, in the storage dtype.
LAYER: Points = ("affine", "table", "one_plus", "product", "sum")
STREAM: Points = ("table", "gated", "residual")


@dataclass(frozen=True)
class Site:
    """One place inside a block. ``name`` is unique in the block and says where, e.g. ``norm1``."""

    name: str
    op: str
    law: Points


@dataclass(frozen=True)
class Processor:
    """An attention processor of the block and the subclass that takes its place.

    Attributes:
        attention: name of the attention module inside the block.
        upstream: path of the exact class that is replaced; any other is left alone.
        ours: path of the subclass, at module level under ``sora_kernels.families.processors``.
        site: norm and rotation of q and k.
        sources: fingerprints of what the subclass restates.
    """

    attention: str
    upstream: str
    ours: str
    site: Site
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Block:
    """A block class of upstream.

    Attributes:
        family: name in reports, unique: it is the key of the row in ``docs/families.md`` too.
        path: of the class.
        skeleton: module of ``sora_kernels.families`` with the two functions below.
        forward: ``fn(block, laws, *args, **kwargs)``; ``laws`` maps a site's name to its mask.
        survey: ``fn(block) -> dict[str, str]``: the sites this very block does not have fused,
            with the reason; a reason for the name ``""`` leaves the whole block alone. A site
            whose reason is ``ABSENT`` does not exist in this block and is not counted.
        sites: in the order of the block's forward.
        processors: of its attentions.
        sources: fingerprints of what the adapter restates.
        when: attributes of a block and their values: variants of one class are rows of their own,
            told apart by these.
    """

    family: str
    path: str
    skeleton: str
    forward: str
    survey: str
    sites: tuple[Site, ...]
    sources: Mapping[str, str]
    processors: tuple[Processor, ...] = ()
    when: Mapping[str, object] = field(default_factory=dict)


ABSENT = "absent"

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
)

BY_PATH: dict[str, tuple[Block, ...]] = {
    path: tuple(b for b in BLOCKS if b.path == path) for path in {b.path for b in BLOCKS}
}
