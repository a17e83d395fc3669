"""sora_kernels: kernels for Diffusion Transformers on packed videos and images of any size."""

from .backend import explain, use_backend
from .families import accelerate, restore
from .laws import Point
from .ops.bias_gelu import bias_gelu
from .ops.causal_conv_pad import causal_conv_pad
from .ops.gate_residual import gate_residual
from .ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from .ops.guided_step import guided_step
from .ops.norm_modulate import norm_modulate
from .ops.norm_silu import norm_silu
from .ops.packed_attention import packed_attention
from .ops.patchify import patchify, unpatchify
from .ops.qk_norm_rope import joint_index, qk_norm_rope, qk_norm_rope_joint
from .packing import Grid, PackedLayout, Rope, Text, Window
from .rows import RowMap
from .sublayers import adaln_attention, adaln_mlp

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "PackedLayout",
    "Point",
    "Rope",
    "RowMap",
    "Text",
    "Window",
    "accelerate",
    "adaln_attention",
    "adaln_mlp",
    "bias_gelu",
    "causal_conv_pad",
    "explain",
    "gate_residual",
    "gate_residual_norm_modulate",
    "guided_step",
    "joint_index",
    "norm_modulate",
    "norm_silu",
    "packed_attention",
    "patchify",
    "qk_norm_rope",
    "qk_norm_rope_joint",
    "restore",
    "unpatchify",
    "use_backend",
]
