"""Rows of the table of families: LTX-Video, Mochi, Cosmos, Latte, Allegro."""

from __future__ import annotations

from ._rows import STREAM, Block, Processor, Site

_MODELS = "diffusers.models.transformers"
_NORMS = "diffusers.models.normalization"
_LTX = f"{_MODELS}.transformer_ltx"

#: RMSNorm of diffusers without weight (its result is rounded), then an operator each.
_RMS = ("xhat", "table", "one_plus", "product", "sum")

BLOCKS: tuple[Block, ...] = (
    Block(
        family="LTX-Video",
        path=f"{_LTX}.LTXVideoTransformerBlock",
        skeleton="ltx",
        forward="ltx_block",
        survey="ltx_survey",
        sites=(
            Site("norm1", "norm_modulate", _RMS),
            Site("attn1", "gate_residual", STREAM),
            Site("attn2+norm2", "gate_residual_norm_modulate", (*_RMS, "residual")),
            Site("ff", "gate_residual", STREAM),
        ),
        sources={
            f"{_LTX}.LTXVideoTransformerBlock.forward": "f6c111a704671d6d",
            f"{_NORMS}.RMSNorm.forward": "b4644477d3960868",
        },
        processors=(
            Processor(
                attention="attn1",
                upstream=f"{_LTX}.LTXVideoAttnProcessor",
                ours="ltx.FusedLTXVideoAttnProcessor",
                site=Site("attn1.qk", "qk_norm_rope", ("affine", "pre_rope")),
                sources={
                    f"{_LTX}.LTXVideoAttnProcessor.__call__": "78517be82dc26323",
                    f"{_LTX}.apply_rotary_emb": "7acea12ce4802628",
                },
            ),
        ),
    ),
)
