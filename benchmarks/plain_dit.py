"""The DiT of `model.dit` in idiomatic PyTorch on the same weights: what ours is timed against.

Nothing here is made slow on purpose. One function is the block on a dense batch ``[B, L, D]``
(with a key mask if the batch is padded), one is the block on packed tokens ``[N, D]`` with one
``scaled_dot_product_attention`` per segment. Everything that depends on sizes alone (rotary
tables, masks, indices) is prepared outside the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dit import Block, DiT, time_features
from sora_kernels.packing import PackedLayout

BlockFunction = Callable[..., Tensor]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs; ``turns`` ``[..., 1, d/2]`` is complex, or real with
    cosine and sine as a last axis.

    Complex products are by far the fastest eager way (on a CPU 10 times and more over strided
    halves); Inductor has no code for them, so what is compiled gets the real ones.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if turns.is_complex():
        turned = torch.view_as_complex(pairs.float()) * turns
        return torch.view_as_real(turned).flatten(-2).type_as(x)
    (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def turns_of(cos: Tensor, sin: Tensor, *, compile: bool) -> Tensor:
    """The tables in the form that suits `rotate`, with an axis for the heads."""
    turns = torch.stack([cos, sin], dim=-1).unsqueeze(-3)
    return turns if compile else torch.view_as_complex(turns)


def per_part(
    function: Callable[..., Tensor], text: int, tokens: Sequence[Tensor], rows: Sequence[Tensor]
) -> Tensor:
    """``function(*tokens, *rows)`` with ``rows`` ``[B, parts, D]``: text tokens use the first row.

    With one part that is a plain broadcast. With two, each side is computed with its own row and
    the sides are concatenated, which moves less than gathering a row per token.
    """
    if rows[0].shape[1] == 1:
        return function(*tokens, *rows)
    return torch.cat(
        [
            function(*(t[:, :text] for t in tokens), *(r[:, :1] for r in rows)),
            function(*(t[:, text:] for t in tokens), *(r[:, 1:] for r in rows)),
        ],
        dim=1,
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


def mlp(block: Block, h: Tensor) -> Tensor:
    return block.mlp_out(F.gelu(block.mlp_in(h), approximate="tanh"))


def dense_block(
    block: Block,
    x: Tensor,
    c: Tensor,
    text: int,
    turns: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """One block on ``x`` ``[B, L, D]``; ``c`` ``[B, parts, D]``; turns ``[B or 1, L, 1, d/2]``."""
    batch, length, _ = x.shape
    shift1, scale1, gate1, shift2, scale2, gate2 = block.rows(c).chunk(6, dim=-1)
    h = per_part(modulate, text, [norm(x)], [shift1, scale1])
    q, k, v = block.qkv(h).view(batch, length, 3, block.heads, block.head_dim).unbind(2)
    q = rotate(F.rms_norm(q, q.shape[-1:], block.q_weight, 1e-6), turns)
    k = rotate(F.rms_norm(k, k.shape[-1:], block.k_weight, 1e-6), turns)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    x = per_part(gated, text, [x, block.out(o.transpose(1, 2).flatten(2))], [gate1])
    h = per_part(modulate, text, [norm(x)], [shift2, scale2])
    return per_part(gated, text, [x, mlp(block, h)], [gate2])


def packed_block(
    block: Block,
    x: Tensor,
    c: Tensor,
    row_of_token: Tensor,
    turns: Tensor,
    lengths: Sequence[int],
) -> Tensor:
    """One block on packed ``x`` ``[N, D]``: a row gathered per token, attention per segment."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.rows(c).chunk(6, dim=-1)
    h = modulate(norm(x), shift1[row_of_token], scale1[row_of_token])
    q, k, v = block.qkv(h).view(-1, 3, block.heads, block.head_dim).unbind(1)
    q = rotate(F.rms_norm(q, q.shape[-1:], block.q_weight, 1e-6), turns)
    k = rotate(F.rms_norm(k, k.shape[-1:], block.k_weight, 1e-6), turns)
    outputs = []
    parts = zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True)
    for qs, ks, vs in parts:
        o = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (qs, ks, vs)))
        outputs.append(o[0].transpose(0, 1).flatten(1))
    x = gated(x, block.out(torch.cat(outputs)), gate1[row_of_token])
    h = modulate(norm(x), shift2[row_of_token], scale2[row_of_token])
    return gated(x, mlp(block, h), gate2[row_of_token])


def rotary_tables(model: DiT, words: int, latent: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin ``[L, d/2]`` of one clip, its words first."""
    from model.condition import clip_segment

    layout = PackedLayout(
        [clip_segment(words, latent, model.config.patch)], patch=model.config.patch
    )
    device = next(model.parameters()).device
    cos, sin = layout.rope(model.config.rope_axes, model.config.rope_theta).dense()
    return cos.to(device), sin.to(device)


def to_patches(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[..., C, T, H, W] -> [..., L, C * pt * ph * pw]``, tokens in raster order."""
    (pt, ph, pw), (t, h, w) = patch, latent.shape[-3:]
    x = (
        latent.unflatten(-1, (w // pw, pw))
        .unflatten(-3, (h // ph, ph))
        .unflatten(-5, (t // pt, pt))
    )
    lead = list(range(latent.dim() - 4))
    n = len(lead)  # then: C, T, pt, H, ph, W, pw
    x = x.permute(*lead, n + 1, n + 3, n + 5, n, n + 2, n + 4, n + 6)
    return x.flatten(-4).flatten(-4, -2)


def from_patches(
    tokens: Tensor, latent: tuple[int, int, int], patch: tuple[int, int, int]
) -> Tensor:
    """The inverse of `to_patches`: ``[..., L, F] -> [..., C, T, H, W]``."""
    (pt, ph, pw), (t, h, w) = patch, latent
    x = tokens.unflatten(-1, (-1, pt, ph, pw)).unflatten(-5, (t // pt, h // ph, w // pw))
    n = tokens.dim() - 2  # T, H, W, C, pt, ph, pw
    x = x.permute(*range(n), n + 3, n, n + 4, n + 1, n + 5, n + 2, n + 6)
    return x.reshape(*tokens.shape[:-2], -1, t, h, w)


@dataclass(frozen=True)
class Clip:
    """One clip of a batch: word numbers ``[Lt]`` and latent ``[C, T, H, W]``."""

    words: Tensor
    latent: Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        t, h, w = self.latent.shape[1:]
        return t, h, w


class PlainDiT:
    """Velocities of clips of different sizes, in four plain ways on one set of weights.

    All clips have equally many words, which spares the plain ways a mask for them. What depends on
    sizes alone is made once: by the first call that needs it, and rotary tables once for all
    batches that share a dict `turns`.
    """

    def __init__(
        self,
        model: DiT,
        clips: Sequence[Clip],
        *,
        compile: bool = False,
        turns: dict[tuple[int, int, int], Tensor] | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        self.text = len(clips[0].words)
        self.words = torch.stack([clip.words for clip in clips])
        self.grids = [clip.grid for clip in clips]
        self.turns = {} if turns is None else turns
        for grid in {*self.grids} - self.turns.keys():
            self.turns[grid] = turns_of(*rotary_tables(model, self.text, grid), compile=compile)
        self.lengths = [len(self.turns[grid]) for grid in self.grids]
        self.dense: BlockFunction = torch.compile(dense_block) if compile else dense_block
        self.packed: BlockFunction = torch.compile(packed_block) if compile else packed_block
        self._buckets: dict[tuple[int, int, int], list[int]] = {}
        for i, grid in enumerate(self.grids):
            self._buckets.setdefault(grid, []).append(i)

    @cached_property
    def _pad(self) -> tuple[Tensor, Tensor]:
        """Rotary tables and the key mask of the padded batch."""
        pad = torch.nn.utils.rnn.pad_sequence
        tables = [self.turns[grid] for grid in self.grids]
        used = pad([table.new_ones(len(table)).real for table in tables], batch_first=True)
        return pad(tables, batch_first=True), (used > 0)[:, None, None]

    @cached_property
    def _pack(self) -> tuple[Tensor, Tensor]:
        """The modulation row of every packed token, and its rotary table."""
        repeats = [n for length in self.lengths for n in (self.text, length - self.text)]
        device = self.words.device
        rows = torch.arange(2 * len(self.lengths), device=device)
        row_of_token = rows.repeat_interleave(torch.tensor(repeats, device=device))
        return row_of_token, torch.cat([self.turns[grid] for grid in self.grids])

    def _condition(self, times: Tensor) -> Tensor:
        """``[B, 2, D]``: the text's row (clean, kind 0) and the clip's (its time, kind 1)."""
        model = self.model
        t = torch.stack([torch.zeros_like(times), times], dim=1)
        features = time_features(t.flatten()).view(len(times), 2, -1)
        features = features.to(model.time_in.weight.dtype)
        kinds = model.kinds.weight[:2]
        return F.silu(model.time_out(F.silu(model.time_in(features))) + kinds)

    def _embed(self, patches: Tensor, words: Tensor) -> Tensor:
        model = self.model
        text = model.words(words) + model.word_positions.weight[: self.text]
        return torch.cat([text, model.patch_in(patches.to(text.dtype))], dim=-2)

    def _run_dense(self, x: Tensor, c: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.model.blocks:
            x = self.dense(block, x, c, self.text, turns, mask)
        shift, scale = self.model.final_rows(c[:, 1:]).chunk(2, dim=-1)
        return self.model.head(modulate(norm(x[:, self.text :]), shift, scale))

    def _equal(self, indices: Sequence[int], latents: Sequence[Tensor], times: Tensor) -> Tensor:
        """Clips of one size as a dense batch without padding."""
        grid = self.grids[indices[0]]
        batch = torch.stack([latents[i] for i in indices])
        where = list(indices)
        x = self._embed(to_patches(batch, self.config.patch), self.words[where])
        tokens = self._run_dense(x, self._condition(times[where]), self.turns[grid][None], None)
        return from_patches(tokens, grid, self.config.patch)

    def loop(self, latents: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        """One clip after another."""
        return [self._equal([i], latents, times)[0] for i in range(len(latents))]

    def bucketed(self, latents: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        """Clips of equal size together, one bucket after another; nothing is padded."""
        out: dict[int, Tensor] = {}
        for indices in self._buckets.values():
            out.update(zip(indices, self._equal(indices, latents, times), strict=True))
        return [out[i] for i in range(len(latents))]

    def padded(self, latents: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        """All clips as one batch, padded to the longest, padding masked as keys."""
        patches = torch.nn.utils.rnn.pad_sequence(
            [to_patches(latent, self.config.patch) for latent in latents], batch_first=True
        )
        x = self._embed(patches, self.words)
        c = self._condition(times)
        tokens = self._run_dense(x, c, *self._pad)
        return [
            from_patches(row[: length - self.text], grid, self.config.patch)
            for row, length, grid in zip(tokens, self.lengths, self.grids, strict=True)
        ]

    def packed_sdpa(self, latents: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        """All clips in one sequence; attention per segment."""
        pieces = []
        for i, latent in enumerate(latents):
            pieces.append(self._embed(to_patches(latent, self.config.patch), self.words[i]))
        x, c = torch.cat(pieces), self._condition(times)
        rows = c.flatten(0, 1)
        row_of_token, turns = self._pack
        for block in self.model.blocks:
            x = self.packed(block, x, rows, row_of_token, turns, self.lengths)
        shift, scale = self.model.final_rows(rows).chunk(2, dim=-1)
        h = modulate(norm(x), shift[row_of_token], scale[row_of_token])
        out = []
        for segment, grid in zip(h.split(self.lengths), self.grids, strict=True):
            tokens = self.model.head(segment[self.text :])
            out.append(from_patches(tokens, grid, self.config.patch))
        return out

    def ways(self) -> dict[str, Callable[[Sequence[Tensor], Tensor], list[Tensor]]]:
        return {
            "plain_padded": self.padded,
            "plain_bucketed": self.bucketed,
            "plain_loop": self.loop,
            "plain_packed": self.packed_sdpa,
        }


def waste(lengths: Sequence[int]) -> float:
    """The share of a padded batch that is padding."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def parameters_of(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
