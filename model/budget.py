"""What a DiT costs: parameters and multiply-accumulates, part by part, in closed form.

MAC counts follow the DiT paper (Peebles & Xie 2022, table 4), whose "Gflops" are multiply-
accumulates: products of matrices and attention, without norms and other elementwise work. One MAC
is two floating point operations, and a backward pass costs twice its forward, so a training step is
``6 * macs`` operations; utilisation (MFU) divides that by time and by a machine's peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.condition import KINDS
from model.config import DiTConfig
from sora_kernels.packing import Part, Text

TIME_FEATURES = 256  # of model.dit, and of the paper
TEXT_STATES = 385  # of model.dit

Budget = dict[str, int]


def parameters(config: DiTConfig) -> Budget:
    """Parameters of ``model.dit.DiT(config)`` by part."""
    d, hidden = config.width, int(config.width * config.mlp_ratio)
    features = config.channels * math.prod(config.patch)
    return {
        "patch embedding": features * d + d,
        "words": (_text_rows(config) + config.max_words) * d,
        "kinds of parts": KINDS * d,
        "time embedding": TIME_FEATURES * d + d + d * d + d,
        "attention": config.depth * (4 * d * d + 4 * d),
        "query and key norms": config.depth * 2 * config.head_dim,
        "mlp": config.depth * (2 * d * hidden + hidden + d),
        "adaLN": config.depth * 6 * (d * d + d),
        "final layer": 2 * (d * d + d) + d * features + features,
    }


def _text_rows(config: DiTConfig) -> int:
    """Of the table of words, or of the projection of an encoder's states with its bias."""
    return config.vocabulary if config.text == "words" else TEXT_STATES + 1


def macs(config: DiTConfig, segments: Sequence[Sequence[Part]]) -> Budget:
    """Multiply-accumulates of one forward pass over the packed ``segments``, by part.

    Every token takes the products of its block; a query meets every key of its segment; each part
    has a row of the modulation. Windows are not counted (they only take away).
    """
    d, hidden = config.width, int(config.width * config.mlp_ratio)
    features = config.channels * math.prod(config.patch)
    lengths = [sum(part.num_tokens for part in segment) for segment in segments]
    tokens, rows = sum(lengths), sum(len(segment) for segment in segments)
    words = sum(part.length for segment in segments for part in segment if isinstance(part, Text))
    grid = tokens - words
    return {
        "patch embedding": grid * features * d,
        "words": 0 if config.text == "words" else words * TEXT_STATES * d,
        "time embedding": rows * (TIME_FEATURES * d + d * d),
        "attention": config.depth * (tokens * 4 * d * d + 2 * d * sum(n * n for n in lengths)),
        "mlp": config.depth * tokens * 2 * d * hidden,
        "adaLN": config.depth * rows * 6 * d * d,
        "final layer": rows * 2 * d * d + grid * d * features,
    }


def training_flops(config: DiTConfig, segments: Sequence[Sequence[Part]]) -> int:
    """Floating point operations of one training step: forward and twice as much backward."""
    return 6 * sum(macs(config, segments).values())
