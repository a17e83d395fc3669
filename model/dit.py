"""A single-stream Diffusion Transformer on packed sequences (Peebles & Xie, arXiv 2212.09748).

Every clip is one segment: its words and its latent patches are tokens of one sequence that attend
to each other. Time enters through adaLN-Zero rows, one per part of a segment, so a clip may hold
clean (given) and noisy parts at once. Between the matrix products, all that touches a token is an
op of `sora_kernels`; nothing is padded, and clips of any size share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.condition import KINDS, Rows, rows_for
from model.config import DiTConfig
from sora_kernels import (
    bias_gelu,
    gate_residual_norm_modulate,
    norm_modulate,
    packed_attention,
    patchify,
    qk_norm_rope,
    unpatchify,
)
from sora_kernels.packing import PackedLayout, Rope, Text

TIME_FEATURES = 256


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
        self.heads, self.head_dim = config.heads, config.head_dim
        self.rows = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_weight = nn.Parameter(torch.ones(config.head_dim))
        self.k_weight = nn.Parameter(torch.ones(config.head_dim))
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def attention(self, h: Tensor, layout: PackedLayout, rope: Rope) -> Tensor:
        """[N, D] -> [N, D]; every token sees its own segment."""
        q, k, v = self.qkv(h).view(-1, 3, self.heads, self.head_dim).unbind(1)
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight, rope)
        return self.out(cast(Tensor, packed_attention(q, k, v, layout)).flatten(1))

    def mlp(self, h: Tensor) -> Tensor:
        """[N, D] -> [N, D], tokenwise."""
        return self.mlp_out(bias_gelu(F.linear(h, self.mlp_in.weight), self.mlp_in.bias))


class DiT(nn.Module):
    """Predicts the flow's velocity of every latent patch from noisy latents, times and words."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, features = config.width, config.channels * math.prod(config.patch)
        self.patch_in = nn.Linear(features, width)
        self.words = nn.Embedding(config.vocabulary, width)
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
        if words.shape != (sum(lengths),):
            raise ValueError(f"words: expected [{sum(lengths)}] numbers, got {list(words.shape)}")
        if max(lengths, default=0) > self.config.max_words:
            raise ValueError(
                f"words: expected at most {self.config.max_words} a prompt, got {max(lengths)}"
            )
        place = torch.cat([torch.arange(n) for n in lengths]).to(words.device) if lengths else words
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
            layout: the parts of every segment, with the config's patch.
            words: int64, the numbers of all text tokens in packed order.
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
            _, _, gate1, shift2, scale2, gate2 = blocks[i]
            shift, scale = blocks[i + 1][:2] if i + 1 < len(blocks) else (final_shift, final_scale)
            y = block.attention(h, layout, rope)
            x, h = gate_residual_norm_modulate(x, y, gate1, shift2, scale2, rows=rows.map)
            x, h = gate_residual_norm_modulate(x, block.mlp(h), gate2, shift, scale, rows=rows.map)
        tokens = self.head(h.index_select(0, layout.grid_tokens))
        return unpatchify(tokens, layout, self.config.channels)
