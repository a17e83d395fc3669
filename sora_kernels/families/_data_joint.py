"""Rows of the table for models whose text joins the attention; see ``_data.py``."""

from __future__ import annotations

from ._rows import Block, Points, Processor, Site

MODULATED: Points = ("affine", "one_plus", "product", "sum")
GATED: Points = ("gated", "residual")
BOTH: Points = (*MODULATED, *GATED)

_MODELS = "diffusers.models.transformers"
_NORMS = "diffusers.models.normalization"
_ATTENTION = "diffusers.models.attention_processor"
_FLUX = f"{_MODELS}.transformer_flux"
_HUNYUAN = f"{_MODELS}.transformer_hunyuan_video"
_REPLACE = f"{_HUNYUAN}.HunyuanVideoTokenReplace"
_COG = f"{_MODELS}.cogvideox_transformer_3d"

_ZERO = {f"{_NORMS}.AdaLayerNormZero.forward": "6d8d04cd7e217e08"}
_SINGLE = {f"{_NORMS}.AdaLayerNormZeroSingle.forward": "8da81358c124918b"}
_ROTATION = {"diffusers.models.embeddings.apply_rotary_emb": "c0725f6dc9f4bc8a"}

# image (or video) stream and text stream side by side: 2/2/2
_TWO_STREAMS = (
    Site("norm1", "norm_modulate", MODULATED),
    Site("norm1_context", "norm_modulate", MODULATED),
    Site("attn+norm2", "gate_residual_norm_modulate", BOTH),
    Site("attn+norm2_context", "gate_residual_norm_modulate", BOTH),
    Site("ff", "gate_residual", GATED),
    Site("ff_context", "gate_residual", GATED),
)
# attention and MLP side by side: 1/0/1
_ONE_STREAM = (
    Site("norm", "norm_modulate", MODULATED),
    Site("proj_out", "gate_residual", GATED),
)

_FLUX_QK = (
    Processor(
        attention="attn",
        upstream=f"{_FLUX}.FluxAttnProcessor",
        ours="flux.FusedFluxAttnProcessor",
        site=Site("attn.qk", "qk_norm_rope", ("affine", "pre_rope")),
        sources={
            f"{_FLUX}.FluxAttnProcessor.__call__": "70862a992df2bc2b",
            f"{_FLUX}._get_qkv_projections": "65cafc127cd919ce",
            f"{_FLUX}._get_projections": "de01698a5c4869d2",
            **_ROTATION,
        },
    ),
)

_HUNYUAN_QK = (
    Processor(
        attention="attn",
        upstream=f"{_HUNYUAN}.HunyuanVideoAttnProcessor2_0",
        ours="hunyuan.FusedHunyuanVideoAttnProcessor",
        site=Site("attn.qk", "qk_norm_rope", ("xhat", "affine", "pre_rope")),
        sources={
            f"{_HUNYUAN}.HunyuanVideoAttnProcessor2_0.__call__": "c2d5255318ef57d4",
            f"{_NORMS}.RMSNorm.forward": "b4644477d3960868",
            **_ROTATION,
        },
    ),
)

_SD3 = "diffusers.models.attention.JointTransformerBlock"
_SD3_SOURCES = {f"{_SD3}.forward": "7d31683bf491d1e3", **_ZERO}


def _sd3_qk(attention: str) -> Processor:
    return Processor(
        attention=attention,
        upstream=f"{_ATTENTION}.JointAttnProcessor2_0",
        ours="sd3.FusedJointAttnProcessor",
        site=Site(f"{attention}.qk", "qk_norm_rope", ("xhat", "affine")),
        sources={
            f"{_ATTENTION}.JointAttnProcessor2_0.__call__": "217e6f45660baa27",
            f"{_NORMS}.RMSNorm.forward": "b4644477d3960868",
        },
    )


BLOCKS: tuple[Block, ...] = (
    Block(
        family="Flux",
        path=f"{_FLUX}.FluxTransformerBlock",
        skeleton="joint",
        forward="flux_block",
        survey="double_survey",
        sites=_TWO_STREAMS,
        sources={f"{_FLUX}.FluxTransformerBlock.forward": "c7036138564cff0d", **_ZERO},
        processors=_FLUX_QK,
    ),
    Block(
        family="Flux single",
        path=f"{_FLUX}.FluxSingleTransformerBlock",
        skeleton="single",
        forward="flux_single",
        survey="single_survey",
        sites=_ONE_STREAM,
        sources={f"{_FLUX}.FluxSingleTransformerBlock.forward": "6de94782d3c83de0", **_SINGLE},
        processors=_FLUX_QK,
    ),
    Block(
        family="HunyuanVideo",
        path=f"{_HUNYUAN}.HunyuanVideoTransformerBlock",
        skeleton="joint",
        forward="hunyuan_block",
        survey="double_survey",
        sites=_TWO_STREAMS,
        sources={f"{_HUNYUAN}.HunyuanVideoTransformerBlock.forward": "98fbfbdcd77438a2", **_ZERO},
        processors=_HUNYUAN_QK,
    ),
    Block(
        family="HunyuanVideo single",
        path=f"{_HUNYUAN}.HunyuanVideoSingleTransformerBlock",
        skeleton="single",
        forward="hunyuan_single",
        survey="single_survey",
        sites=_ONE_STREAM,
        sources={
            f"{_HUNYUAN}.HunyuanVideoSingleTransformerBlock.forward": "e6f3ea29054dfb48",
            **_SINGLE,
        },
        processors=_HUNYUAN_QK,
    ),
    Block(
        family="HunyuanVideo token replace",
        path=f"{_HUNYUAN}.HunyuanVideoTokenReplaceTransformerBlock",
        skeleton="joint",
        forward="hunyuan_block",
        survey="double_survey",
        sites=_TWO_STREAMS,
        sources={
            f"{_REPLACE}TransformerBlock.forward": "28ef4ec04cb74bc5",
            f"{_REPLACE}AdaLayerNormZero.forward": "fff04381f8ae1096",
            **_ZERO,
        },
        processors=_HUNYUAN_QK,
    ),
    Block(
        family="HunyuanVideo token replace single",
        path=f"{_HUNYUAN}.HunyuanVideoTokenReplaceSingleTransformerBlock",
        skeleton="single",
        forward="hunyuan_single",
        survey="single_survey",
        sites=_ONE_STREAM,
        sources={
            f"{_REPLACE}SingleTransformerBlock.forward": "06f4093edc98cf7d",
            f"{_REPLACE}AdaLayerNormZeroSingle.forward": "f301036837760d67",
            **_SINGLE,
        },
        processors=_HUNYUAN_QK,
    ),
    Block(
        family="CogVideoX",
        path=f"{_COG}.CogVideoXBlock",
        skeleton="cogvideox",
        forward="cogvideox_block",
        survey="cogvideox_survey",
        sites=(
            Site("norm1", "norm_modulate", MODULATED),
            Site("norm1.text", "norm_modulate", MODULATED),
            Site("attn1+norm2", "gate_residual_norm_modulate", BOTH),
            Site("attn1+norm2.text", "gate_residual_norm_modulate", BOTH),
            Site("ff", "gate_residual", GATED),
            Site("ff.text", "gate_residual", GATED),
        ),
        sources={
            f"{_COG}.CogVideoXBlock.forward": "9d09db202a0a0fe6",
            f"{_NORMS}.CogVideoXLayerNormZero.forward": "7c300d7dc0a9da9a",
        },
        processors=(
            Processor(
                attention="attn1",
                upstream=f"{_ATTENTION}.CogVideoXAttnProcessor2_0",
                ours="cogvideox.FusedCogVideoXAttnProcessor",
                site=Site("attn1.qk", "qk_norm_rope", ("affine", "pre_rope")),
                sources={
                    f"{_ATTENTION}.CogVideoXAttnProcessor2_0.__call__": "4242220cefa248dd",
                    **_ROTATION,
                },
            ),
        ),
    ),
    Block(
        family="SD3",
        path=_SD3,
        skeleton="joint",
        forward="sd3_block",
        survey="sd3_survey",
        sites=_TWO_STREAMS,
        sources=_SD3_SOURCES,
        processors=(_sd3_qk("attn"),),
        when={"use_dual_attention": False, "context_pre_only": False},
    ),
    Block(
        family="SD3 last",
        path=_SD3,
        skeleton="joint",
        forward="sd3_block",
        survey="sd3_survey",
        sites=tuple(s for s in _TWO_STREAMS if s.name not in ("attn+norm2_context", "ff_context")),
        sources={
            **_SD3_SOURCES,
            f"{_NORMS}.AdaLayerNormContinuous.forward": "361afe55ce135da5",
        },
        processors=(_sd3_qk("attn"),),
        when={"use_dual_attention": False, "context_pre_only": True},
    ),
    Block(
        family="SD3.5 dual attention",
        path=_SD3,
        skeleton="joint",
        forward="sd3_block",
        survey="sd3_survey",
        sites=_TWO_STREAMS,
        sources={
            **_SD3_SOURCES,
            f"{_NORMS}.SD35AdaLayerNormZeroX.forward": "47354fab8a27c90d",
        },
        processors=(_sd3_qk("attn"), _sd3_qk("attn2")),
        when={"use_dual_attention": True, "context_pre_only": False},
    ),
)
