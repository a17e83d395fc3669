"""What every study makes: encoded clips of its world, and the small model that learns from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.config import DITS, MODES, WorldConfig
from model.data import Encode, LatentCache, build_cache
from model.dit import DiT
from model.text import Vocabulary
from model.world import VOCABULARY

MAX_WORDS = 48


@torch.no_grad()
def encoded(encode: Encode, world: WorldConfig, seed: int, clips: int) -> LatentCache:
    """Clips of `world` with nothing given."""
    words = Vocabulary(VOCABULARY)
    return build_cache(encode, world, MODES["text"][:1], clips, seed, words, MAX_WORDS)


def new_dit(name: str) -> DiT:
    """A model of that name in `DITS`, with the words of the world."""
    return DiT(replace(DITS[name], vocabulary=len(Vocabulary(VOCABULARY))))
