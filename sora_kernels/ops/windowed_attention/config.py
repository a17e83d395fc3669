"""Launch configurations of `windowed_attention`: a pure function of head dim, dtype and chip.

Nothing here may depend on the pack or the window: the blocks decide the order of summation, and
packed must equal alone bitwise.
"""

from __future__ import annotations

from dataclasses import replace

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
    config = choose_dense_config(head_dim, dtype, capability)
    if capability[0] == 9 and dtype is not torch.float32:
        # What finds a block's rows takes registers: two programs do not fit, so blocks are large.
        if dim1 + dim2 <= 128:
            config = replace(config, fwd=config.fwd._replace(block_n=128))
        else:  # wider blocks come out as wgmma one after another
            config = replace(
                config, fwd=config.fwd._replace(block_n=32), dq=config.dq._replace(block_m=32)
            )
    elif capability[0] in (8, 12) and dim1 + dim2 == 128:  # 99 KB of shared memory
        config = replace(config, fwd=config.fwd._replace(num_stages=min(config.fwd.num_stages, 2)))
    return config


def config_for(q: Tensor) -> Config:
    """The launches for queries like ``q`` on the chip they lie on."""
    return choose_config(q.shape[2], q.dtype, chip_of(q))
