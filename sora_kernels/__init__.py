"""sora_kernels: kernels for Diffusion Transformers on packed videos and images of any size."""

from .backend import explain, use_backend
from .laws import Point
from .ops.norm_modulate import norm_modulate
from .rows import RowMap

__version__ = "0.1.0"

__all__ = ["Point", "RowMap", "explain", "norm_modulate", "use_backend"]
