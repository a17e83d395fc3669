"""Cross-attentions whose mask leaves few text tokens are packed, and no others.

The inputs of these families (`test_basic`, `test_allegro`, `test_ltx`) have such masks, so that all
common tests run the packed attention; here is when it may not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from sora_kernels import accelerate, restore
from sora_kernels.families.processors import _masked
from tests.families import test_allegro, test_basic, test_ltx
from tests.families.common import close, gradients, parameters, run
from tests.helpers import randn

Inputs = Callable[[torch.dtype], dict[str, Any]]
FAMILIES: dict[str, tuple[Callable[[], Any], Inputs]] = {
    "pixart": (test_basic.pixart, test_basic.pixart_inputs),
    "allegro": (test_allegro.model, test_allegro.inputs),
    "ltx": (test_ltx.model, test_ltx.inputs),
}


@pytest.fixture()
def keys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each packed attention was given."""
    seen: list[int] = []
    packed = _masked.packed_attention

    def watched(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(k))
        return packed(q, k, *args, **kwargs)

    monkeypatch.setattr(_masked, "packed_attention", watched)
    return seen


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    build, inputs = FAMILIES[request.param]
    return build(), inputs(torch.float32)


def with_mask(given: dict[str, Any], mask: Any) -> dict[str, Any]:
    return {**given, "encoder_attention_mask": mask}


def test_same_numbers_of_the_keys_that_are_left(family: Any, keys: list[int]) -> None:
    """The tokens that are left need not be the first ones; the text before has its gradient."""
    model, given = family
    given = with_mask(given, torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]))
    text = given["encoder_hidden_states"].requires_grad_()
    results = []
    for patched in (False, True):
        if patched:
            accelerate(model, strict=True)
        out = run(model, given)
        results.append((out, gradients([out], {**parameters(model), "text": text})))
    assert keys == [3, 3]
    close({"": results[1][0]}, {"": results[0][0]}, 2e-5)
    close(results[1][1], results[0][1], 1e-4)
    assert results[1][1]["text"][0, 0].eq(0).all()


MASKS = {
    "none": None,
    "more than half": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
    "a sample without text": torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]),
    "another bias": -3.0 * torch.tensor([[[0, 0, 1, 1, 1.0]], [[0, 1, 1, 1, 1]]]),
    "learned": nn.Parameter(-1e4 * torch.tensor([[[0, 0, 1, 1, 1.0]], [[0, 1, 1, 1, 1]]])),
}


@pytest.mark.parametrize("mask", MASKS)
def test_other_masks_stay(family: Any, mask: str, keys: list[int]) -> None:
    model, given = family
    given = with_mask(given, MASKS[mask])
    with torch.no_grad():
        want = run(model, given)
        accelerate(model, strict=True)
        close({"": run(model, given)}, {"": want}, 2e-5)
    assert not keys


def test_a_mask_is_read_once_and_again_when_it_changes() -> None:
    mask = -1e4 * torch.tensor([[[0, 0, 1, 1, 1.0]], [[0, 1, 1, 1, 1]]])
    x, text = randn(2, 4, 8, seed=1), randn(2, 5, 8, seed=2)
    first = _masked.packed_keys(mask, x, text)
    assert first is not None and first.cu_seqlens.tolist() == [0, 2, 3] and first.longest == 2
    assert _masked.packed_keys(mask, x, text) is first
    mask[1, 0, 1] = 0
    second = _masked.packed_keys(mask, x, text)
    assert second is not None and second.rows.tolist() == [0, 1, 5, 6]
    for other in (text.bfloat16(), text[:1], text[:, :4]):
        assert _masked.packed_keys(mask, x, other) is None
    with torch.inference_mode():
        assert _masked.packed_keys(mask.clone(), x, text) is None


def test_an_attention_backend_that_was_asked_for_runs(
    keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    active = _AttentionBackendRegistry._active_backend  # setting one for a model sets this too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    model, given = test_ltx.model(), test_ltx.inputs(torch.float32)
    want = run(model, given)
    accelerate(model, strict=True)
    model.set_attention_backend("_native_math")
    close({"": run(model, given)}, {"": want}, 2e-5)
    assert not keys
    model.reset_attention_backend()
    with attention_backend("_native_math"):
        run(model, given)
    assert not keys
    model.set_attention_backend("native")
    run(model, given)
    assert keys == [5, 5]


def test_unknown_processors_and_other_attentions_are_left_alone(keys: list[int]) -> None:
    class Mine(AttnProcessor2_0):
        pass

    model: Any = test_basic.pixart()
    model.transformer_blocks[0].attn2.set_processor(Mine())
    model.transformer_blocks[1].attn2.rescale_output_factor = 2.0
    want = run(model, test_basic.pixart_inputs(torch.float32))
    report = accelerate(model)
    assert [(e.module, e.site, e.reason) for e in report.left] == [
        ("transformer_blocks.0", "attn2.text", "the processor is Mine"),
        ("transformer_blocks.1", "attn2.text", "a residual or a factor inside the attention"),
    ]
    close({"": run(model, test_basic.pixart_inputs(torch.float32))}, {"": want}, 2e-5)
    assert not keys and type(model.transformer_blocks[0].attn2.processor) is Mine
    restore(model)
    assert type(model.transformer_blocks[0].attn2.processor) is Mine
