"""Caches and layer skipping of diffusers on accelerated models: what they give without us."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)
from torch import Tensor, nn

from sora_kernels import accelerate
from sora_kernels.families import is_accelerated
from tests.families import test_basic, test_cogvideox, test_flux, test_hunyuan_video, test_wan
from tests.families.common import blocks, close, run

STEPS = 4
Family = tuple[Callable[[], Any], Callable[[torch.dtype], dict[str, Any]]]

WAN: Family = (test_wan.model, test_wan.inputs)
FLUX: Family = (test_flux.model, test_flux.inputs)
HUNYUAN: Family = (test_hunyuan_video.model, test_hunyuan_video.inputs)
COGVIDEOX: Family = (test_cogvideox.model, test_cogvideox.inputs)
PIXART: Family = (test_basic.pixart, test_basic.pixart_inputs)


def taylor(step: list[int]) -> Any:
    return TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    )


def mag(step: list[int]) -> Any:
    return MagCacheConfig(
        threshold=1e6, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=STEPS,
        mag_ratios=[1.0] * STEPS,
    )  # fmt: skip


def broadcast(step: list[int]) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1000),
        cross_attention_timestep_skip_range=(-1, 1000),
        current_timestep_callback=lambda: step[0],
    )  # fmt: skip


def faster(step: list[int], **options: Any) -> Any:
    """Attention of every second step; of a batch with guidance, its half without a prompt too."""
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 850),
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 850),
        attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: step[0],
        **options,
    )  # fmt: skip


def faster_distilled(step: list[int]) -> Any:
    return faster(step, is_guidance_distilled=True, tensor_format="BCHW")


def faster_guided(step: list[int]) -> Any:
    return faster(step, tensor_format="BFCHW")


CACHES: dict[str, tuple[Family, Callable[[list[int]], Any]]] = {
    "taylorseer flux": (FLUX, taylor),
    "magcache hunyuan": (HUNYUAN, mag),
    "magcache wan": (WAN, mag),
    "broadcast cogvideox": (COGVIDEOX, broadcast),
    "broadcast flux": (FLUX, broadcast),
    "fastercache flux": (FLUX, faster_distilled),
    "fastercache cogvideox": (COGVIDEOX, faster_guided),
}


def denoise(model: nn.Module, inputs: dict[str, Any], step: list[int]) -> list[Tensor]:
    """A few steps; what a model sees changes slowly from one to the next."""
    found = []
    with torch.no_grad(), model.cache_context("cond"):  # type: ignore[operator]
        for number in range(STEPS):
            step[0] = 900 - 100 * number
            scaled = {**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.05 * number)}
            found.append(run(model, scaled))
    return found


def counted(model: nn.Module) -> Counter[str]:
    """Calls of the attentions' linear layers, which a cache saves."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith("to_q"):
            module.register_forward_hook(lambda *_, n=name: calls.update([n]))  # type: ignore[misc]
    return calls


@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str) -> None:
    """Before or after ours: the same outputs, and the same calls saved."""
    (build, given), config = CACHES[name]
    results = []
    for order in ("alone", "cache first", "ours first"):
        model, step = build(), [0]
        if order == "ours first":
            assert not accelerate(model).left
        model.enable_cache(config(step))
        if order == "cache first":
            assert not accelerate(model).left
        calls = counted(model)
        results.append((denoise(model, given(torch.float32), step), calls))
        assert all(is_accelerated(b) is (order != "alone") for b in blocks(model))
    want, calls = results[0]
    assert calls.total() < STEPS * len(calls)
    for got, made in results[1:]:
        assert made == calls
        for a, b in zip(got, want, strict=True):
            close({"": a}, {"": b}, 2e-5)


def test_seacache() -> None:
    """It knows Wan by its class and reads the norm of the first block."""
    build, given = WAN
    outputs = []
    for patched in (False, True):
        model = build()
        if patched:
            accelerate(model, strict=True)
        model.enable_cache(SeaCacheConfig())
        outputs.append(denoise(model, given(torch.float32), [0]))
    for got, want in zip(*outputs, strict=True):
        close({"": got}, {"": want}, 2e-5)


SKIPS: dict[str, dict[str, Any]] = {
    "block": {},
    "feed-forward": {"skip_attention": False},
    "attention": {"skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


# Without us too: Wan's processor is listed under a deprecated name, Flux's attention does not say
# whether it is a cross-attention.
REFUSED = {"wan": ValueError, "flux": AttributeError}


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
def test_layer_skip(name: str, skip: str) -> None:
    """Of blocks, feed-forwards, attentions or their scores, before or after ours: what it does
    alone, and where diffusers refuses it, that is what is raised, and the model stays as it was."""
    (build, given), refused = {"pixart": PIXART, "flux": FLUX, "wan": WAN}[name], None
    if "skip_ff" in SKIPS[skip]:
        refused = REFUSED.get(name)
    inputs = given(torch.float32)
    untouched = run(build(), inputs)
    results = []
    for order in ("alone", "skip first", "ours first"):
        model = build()
        if order == "ours first":
            accelerate(model, strict=True)
        config = LayerSkipConfig(
            [1], "blocks" if name == "wan" else "transformer_blocks", **SKIPS[skip]
        )
        if refused is None:
            apply_layer_skip(model, config)
        else:
            with pytest.raises(refused):
                apply_layer_skip(model, config)
        if order == "skip first":
            accelerate(model, strict=True)
        results.append(run(model, inputs))
    want = results[0]
    assert torch.equal(want, untouched) is (refused is not None)
    for got in results[1:]:
        close({"": got}, {"": want}, 2e-5)
