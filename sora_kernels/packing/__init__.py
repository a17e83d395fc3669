"""Packed batches: what is in a sequence, in which order, and where."""

from .host import PART_COLUMNS, Capacity
from .layout import PackedLayout
from .parts import Grid, Order, Part, Text
from .rope import Rope
from .shard import LayoutShard
from .tiles import QUERY_BLOCK, tile_efficiency, tile_order, tile_shape, tile_start
from .windows import Window

__all__ = [
    "PART_COLUMNS",
    "QUERY_BLOCK",
    "Capacity",
    "Grid",
    "LayoutShard",
    "Order",
    "PackedLayout",
    "Part",
    "Rope",
    "Text",
    "Window",
    "tile_efficiency",
    "tile_order",
    "tile_shape",
    "tile_start",
]
