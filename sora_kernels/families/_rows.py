"""What a row of the table of families (``_data.py``) consists of."""

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


#: A cross-attention whose mask leaves few tokens of the text.
TEXT = Site("attn2.text", "packed_attention", ONCE)


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
