"""Launch configurations of `windowed_attention`: a pure function of head dim, dtype and chip.

Nothing here may depend on the pack or the window: the blocks decide the order of summation, and
packed must equal alone bitwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed_attention.config import Config, Launch, chip_of, split_head_dim
from ..packed_attention.config import choose_config as choose_dense_config

INTERPRETER = Launch(16, 16, 1, 1, group=1)


def choose_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Config:
    """The launches for a chip; `capability=None` is the interpreter."""
    dim1, dim2 = split_head_dim(head_dim)
    if capability is None:
        return Config(INTERPRETER, INTERPRETER, INTERPRETER, dim1, dim2)
    return choose_dense_config(head_dim, dtype, capability)


def config_for(q: Tensor) -> Config:
    """The launches for queries like ``q`` on the chip they lie on."""
    return choose_config(q.shape[2], q.dtype, chip_of(q))
