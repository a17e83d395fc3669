"""Rows of the table: ``BasicTransformerBlock``, which DiT, PixArt and Latte share."""

from __future__ import annotations

from ._rows import LAYER, STREAM, TEXT, Block, Processor, Site

_ATTENTION = "diffusers.models.attention"
_PATH = f"{_ATTENTION}.BasicTransformerBlock"
_SOURCES = {f"{_PATH}.forward": "b1f702ea2d8f9038"}
_GATED = ("gated", "residual")
_NORMED = ("affine", "one_plus", "product", "sum")  # modulation without a table

BLOCKS: tuple[Block, ...] = (
    Block(
        family="DiT",
        path=_PATH,
        when={"norm_type": "ada_norm_zero"},
        skeleton="basic",
        forward="dit_block",
        survey="dit_survey",
        sites=(
            Site("norm1", "norm_modulate", _NORMED),
            Site("attn1+norm3", "gate_residual_norm_modulate", (*_NORMED, *_GATED)),
            Site("ff", "gate_residual", _GATED),
        ),
        sources={
            **_SOURCES,
            "diffusers.models.normalization.AdaLayerNormZero.forward": "6d8d04cd7e217e08",
        },
    ),
    Block(
        family="Latte (temporal)",
        path=_PATH,
        when={"norm_type": "ada_norm_single", "attn2": None},
        skeleton="basic",
        forward="single_block",
        survey="single_survey",
        sites=(
            Site("norm1", "norm_modulate", LAYER),
            Site("attn1+norm2", "gate_residual_norm_modulate", (*LAYER, *_GATED)),
            Site("ff", "gate_residual", STREAM),
        ),
        sources=_SOURCES,
    ),
    Block(
        family="PixArt, Latte",
        path=_PATH,
        when={"norm_type": "ada_norm_single"},
        skeleton="basic",
        forward="single_block",
        survey="single_survey",
        sites=(
            Site("norm1", "norm_modulate", LAYER),
            Site("attn1", "gate_residual", STREAM),
            Site("attn2+norm2", "gate_residual_norm_modulate", (*LAYER, "residual")),
            Site("ff", "gate_residual", STREAM),
        ),
        sources=_SOURCES,
        processors=(
            Processor(
                attention="attn2",
                upstream=f"{_ATTENTION}_processor.AttnProcessor2_0",
                ours="cross.PackedAttnProcessor",
                site=TEXT,
                sources={f"{_ATTENTION}_processor.AttnProcessor2_0.__call__": "a89d46dc24b4b439"},
            ),
        ),
    ),
)
