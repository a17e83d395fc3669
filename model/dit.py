"""A single-stream Diffusion Transformer on packed sequences (Peebles & Xie, arXiv 2212.09748).

Every clip is one segment: its words and its latent patches are tokens of one sequence that attend
to each other. Time enters through adaLN-Zero rows, one per part of a segment, so a clip may hold
clean (given) and noisy parts at once. Between the matrix products, all that touches a token is an
op of `sora_kernels`; nothing is padded, and clips of any size share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.condition import KINDS, Rows, rows_for
from model.config import DiTConfig
from sora_kernels import (
    RowMap,
    adaln_attention,
    adaln_mlp,
    bias_gelu,
    norm_modulate,
    patchify,
    unpatchify,
)
from sora_kernels.packing import PackedLayout, Rope, Text

TIME_FEATURES = 256
TEXT_STATES = 384 + 1  # numbers of a token by the text encoder "minilm", see model.text.text_inputs


def time_features(t: Tensor, count: int = TIME_FEATURES) -> Tensor:
    """Sines and cosines of 1000 t at `count / 2` frequencies, 1 down to 1e-4: [R, count]."""
    half = count // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """Attention and MLP, each behind an adaLN-Zero norm and a gate that starts at zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.head_dim, self.window = config.heads, config.head_dim, config.window
        self.rows = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_weight = nn.Parameter(torch.ones(config.head_dim))
        self.k_weight = nn.Parameter(torch.ones(config.head_dim))
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def up(self, h: Tensor) -> Tensor:
        """The MLP's first product; its bias is added in the pass of the GELU."""
        return F.linear(h, self.mlp_in.weight)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: Sequence[Tensor],
        following: tuple[Tensor, Tensor],
        layout: PackedLayout,
        rope: Rope,
        rows: RowMap,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The stream [N, D] after the block, and its norm under the modulation that comes next.

        Args:
            x: the residual stream, [N, D].
            h: its norm under this block's first modulation.
            modulation: (shift, scale, gate, shift, scale, gate), [R, D] each.
            following: (shift, scale) of whatever reads the stream next.
            layout, rope, rows: of the pack.
            recompute: keep half as much for the backward, for about 5% more time.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        halves: Any = {"rows": rows, "recompute": recompute}
        x, h = adaln_attention(
            x, (shift1, scale1, gate1), self.qkv, self.out, layout, rope,
            heads=self.heads, q_weight=self.q_weight, k_weight=self.k_weight,
            normed=h, next_modulation=(shift2, scale2), window=self.window, **halves,
        )  # fmt: skip
        x, h = adaln_mlp(
            x, (shift2, scale2, gate2), self.up, self.mlp_out,
            activation=partial(bias_gelu, bias=self.mlp_in.bias),
            normed=h, next_modulation=following, **halves,
        )  # fmt: skip
        return x, h


class DiT(nn.Module):
    """Predicts the flow's velocity of every latent patch from noisy latents, times and words.

    Args:
        config: sizes.
        recompute: keep half as much of each block for the backward, see `Block.forward`.
    """

    def __init__(self, config: DiTConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        width, features = config.width, config.channels * math.prod(config.patch)
        self.patch_in = nn.Linear(features, width)
        self.words = (
            nn.Embedding(config.vocabulary, width)
            if config.text == "words"
            else nn.Linear(TEXT_STATES, width)
        )
        self.word_positions = nn.Embedding(config.max_words, width)
        self.kinds = nn.Embedding(KINDS, width)
        self.time_in = nn.Linear(TIME_FEATURES, width)
        self.time_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_rows = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, features)
        self._initialise()

    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def _initialise(self) -> None:
        """Xavier weights, small embeddings, and zeros where adaLN-Zero wants the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for table in (self.words, self.word_positions):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.5)
        for time in (self.time_in, self.time_out):
            nn.init.normal_(time.weight, std=0.02)
        for linear in [*(block.rows for block in self.layers()), self.final_rows, self.head]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def modulation(self, rows: Rows) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Per block (shift, scale, gate, shift, scale, gate) and the final (shift, scale).

        All are [R, D] chunks of one projection: strided views that the ops read in place.
        """
        t = time_features(rows.times).to(self.time_in.weight.dtype)
        c = self.time_out(F.silu(self.time_in(t))) + self.kinds(rows.kinds)
        c = F.silu(c)
        blocks = [block.rows(c).chunk(6, -1) for block in self.layers()]
        return blocks, self.final_rows(c).chunk(2, -1)

    def embed(self, latents: Sequence[Tensor], layout: PackedLayout, words: Tensor) -> Tensor:
        """Patches and words in packed order: [N, D]."""
        grid = self.patch_in(patchify(list(latents), layout).to(self.patch_in.weight.dtype))
        lengths = [
            part.length for segment in layout.segments for part in segment if isinstance(part, Text)
        ]
        shape = [sum(lengths)] + [TEXT_STATES] * (self.config.text != "words")
        if list(words.shape) != shape:
            raise ValueError(f"words: expected {shape} numbers, got {list(words.shape)}")
        if max(lengths, default=0) > self.config.max_words:
            raise ValueError(
                f"words: expected at most {self.config.max_words} a prompt, got {max(lengths)}"
            )
        none = torch.zeros(0, dtype=torch.int64, device=words.device)
        place = torch.cat([torch.arange(n) for n in lengths]).to(words.device) if lengths else none
        if words.is_floating_point():
            words = words.to(self.patch_in.weight.dtype)
        text = self.words(words) + self.word_positions(place)
        x = torch.zeros(layout.num_tokens, self.config.width, dtype=grid.dtype, device=grid.device)
        return x.index_copy(0, layout.grid_tokens, grid).index_copy(0, layout.text_tokens, text)

    def forward(
        self,
        latents: Sequence[Tensor],
        layout: PackedLayout,
        words: Tensor,
        times: Tensor | Rows,
    ) -> list[Tensor]:
        """Velocity of every grid part.

        Args:
            latents: one [C, T, H, W] per grid part, in packed order; given parts clean, targets at
                their time.
            layout: the parts of every segment, made with ``config.layout``.
            words: int64 [n], the numbers of all text tokens in packed order, or with the text
                encoder "minilm" their states [n, 385] (`model.text.text_inputs`).
            times: fp32 [segments], the time of each segment's targets, or `Rows` for any other
                assignment (a row per frame, per token, ...).

        Returns:
            [C, T, H, W] per grid part; what it says about given parts means nothing.
        """
        rows = times if isinstance(times, Rows) else rows_for(layout, times)
        blocks, (final_shift, final_scale) = self.modulation(rows)
        rope = layout.rope(self.config.rope_axes, self.config.rope_theta)
        x = self.embed(latents, layout, words)
        h = cast(Tensor, norm_modulate(x, *blocks[0][:2], rows=rows.map))
        for i, block in enumerate(self.layers()):
            shift, scale = blocks[i + 1][:2] if i + 1 < len(blocks) else (final_shift, final_scale)
            x, h = block(x, h, blocks[i], (shift, scale), layout, rope, rows.map, self.recompute)
        tokens = self.head(h.index_select(0, layout.grid_tokens))
        return unpatchify(tokens, layout, self.config.channels)
