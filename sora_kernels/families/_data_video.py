"""Rows of the table of families: LTX-Video, Mochi, Cosmos, Allegro."""

from __future__ import annotations

from ._rows import LAYER, ONCE, STREAM, TEXT, Block, Processor, Site

_MODELS = "diffusers.models.transformers"
_NORMS = "diffusers.models.normalization"
_PROCESSORS = "diffusers.models.attention_processor"
_LTX = f"{_MODELS}.transformer_ltx"
_ALLEGRO = f"{_MODELS}.transformer_allegro"
_COSMOS = f"{_MODELS}.transformer_cosmos"
_MOCHI = f"{_MODELS}.transformer_mochi"

#: RMSNorm of diffusers without weight (its result is rounded), then an operator each.
_RMS = ("xhat", "table", "one_plus", "product", "sum")

#: F.layer_norm without weight, then an operator each; the modulation is added up before.
_LAYER = ("affine", "one_plus", "product", "sum")
_ADDED = ("gated", "residual")
#: A branch is normed, multiplied by the tanh of its gate and rounded, in fp32 up to there.
_SANDWICH = ("tanh", "gated", "residual")
_MOCHI_SITES = (
    Site("norm1", "norm_modulate", ONCE),
    Site("norm1_context", "norm_modulate", ONCE),
    Site("attn1", "gate_residual", _SANDWICH),
    Site("norm3", "norm_modulate", ONCE),
    Site("ff", "gate_residual", _SANDWICH),
)
_MOCHI_SOURCES = {
    f"{_MOCHI}.MochiTransformerBlock.forward": "87e6db84f46645b1",
    f"{_MOCHI}.MochiModulatedRMSNorm.forward": "54a3ec998e64349c",
    f"{_MOCHI}.MochiRMSNormZero.forward": "b03b1ee17bd8392e",
    f"{_MOCHI}.MochiLayerNormContinuous.forward": "bb7e2bac1ef84978",
    f"{_NORMS}.RMSNorm.forward": "b4644477d3960868",
}
_MOCHI_PROCESSORS = (
    Processor(
        attention="attn1",
        upstream=f"{_PROCESSORS}.MochiAttnProcessor2_0",
        ours="mochi.FusedMochiAttnProcessor",
        site=Site("attn1.qk", "qk_norm_rope", ("affine", "pre_rope")),
        sources={
            f"{_PROCESSORS}.MochiAttnProcessor2_0.__call__": "09de4b0085b9cfff",
            f"{_NORMS}.MochiRMSNorm.forward": "c1d6f9236dfda2b2",
        },
    ),
)

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
            Processor(
                attention="attn2",
                upstream=f"{_LTX}.LTXVideoAttnProcessor",
                ours="ltx_cross.PackedLTXVideoAttnProcessor",
                site=TEXT,
                sources={f"{_LTX}.LTXVideoAttnProcessor.__call__": "78517be82dc26323"},
            ),
        ),
    ),
    Block(
        family="Mochi",
        path=f"{_MOCHI}.MochiTransformerBlock",
        skeleton="sandwich",
        forward="mochi_block",
        survey="mochi_survey",
        sites=(
            *_MOCHI_SITES,
            Site("attn1_context", "gate_residual", _SANDWICH),
            Site("norm3_context", "norm_modulate", ONCE),
            Site("ff_context", "gate_residual", _SANDWICH),
        ),
        sources=_MOCHI_SOURCES,
        processors=_MOCHI_PROCESSORS,
        when={"context_pre_only": False},
    ),
    Block(
        family="Mochi, last block",
        path=f"{_MOCHI}.MochiTransformerBlock",
        skeleton="sandwich",
        forward="mochi_block",
        survey="mochi_survey",
        sites=_MOCHI_SITES,
        sources=_MOCHI_SOURCES,
        processors=_MOCHI_PROCESSORS,
        when={"context_pre_only": True},
    ),
    Block(
        family="Cosmos",
        path=f"{_COSMOS}.CosmosTransformerBlock",
        skeleton="cosmos",
        forward="cosmos_block",
        survey="cosmos_survey",
        sites=(
            Site("norm1", "norm_modulate", _LAYER),
            Site("attn1+norm2", "gate_residual_norm_modulate", (*_LAYER, *_ADDED)),
            Site("attn2+norm3", "gate_residual_norm_modulate", (*_LAYER, *_ADDED)),
            Site("ff", "gate_residual", _ADDED),
        ),
        sources={
            f"{_COSMOS}.CosmosTransformerBlock.forward": "aa3287e04f20f8ba",
            f"{_COSMOS}.CosmosAdaLayerNormZero.forward": "4562b3a5755b4f44",
        },
        processors=(
            Processor(
                attention="attn1",
                upstream=f"{_COSMOS}.CosmosAttnProcessor2_0",
                ours="cosmos.FusedCosmosAttnProcessor",
                site=Site("attn1.qk", "qk_norm_rope", ("xhat", "affine", "pre_rope")),
                sources={
                    f"{_COSMOS}.CosmosAttnProcessor2_0.__call__": "f781d89a64533464",
                    f"{_NORMS}.RMSNorm.forward": "b4644477d3960868",
                    "diffusers.models.embeddings.apply_rotary_emb": "c0725f6dc9f4bc8a",
                },
            ),
        ),
    ),
    Block(
        family="Allegro",
        path=f"{_ALLEGRO}.AllegroTransformerBlock",
        skeleton="allegro",
        forward="allegro_block",
        survey="allegro_survey",
        sites=(
            Site("norm1", "norm_modulate", LAYER),
            Site("attn1", "gate_residual", STREAM),
            Site("attn2+norm2", "gate_residual_norm_modulate", (*LAYER, "residual")),
            Site("ff", "gate_residual", STREAM),
        ),
        sources={f"{_ALLEGRO}.AllegroTransformerBlock.forward": "3392a366559772c1"},
        processors=(
            Processor(
                attention="attn1",
                upstream=f"{_PROCESSORS}.AllegroAttnProcessor2_0",
                ours="allegro.FusedAllegroAttnProcessor",
                site=Site("attn1.qk", "qk_norm_rope", ONCE),
                sources={
                    f"{_PROCESSORS}.AllegroAttnProcessor2_0.__call__": "09391e058bb29c90",
                    "diffusers.models.embeddings.apply_rotary_emb_allegro": "4f27032c97eabadc",
                },
            ),
            Processor(
                attention="attn2",
                upstream=f"{_PROCESSORS}.AllegroAttnProcessor2_0",
                ours="cross.PackedAllegroAttnProcessor",
                site=TEXT,
                sources={f"{_PROCESSORS}.AllegroAttnProcessor2_0.__call__": "09391e058bb29c90"},
            ),
        ),
    ),
)
