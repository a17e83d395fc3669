"""The DiT: packing changes nothing, adaLN-Zero starts as the identity, every part has its time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.condition import GIVEN, TARGET, TEXT, Rows, clip_segment, rows_for
from model.config import DITS, DiTConfig
from model.dit import DiT
from model.sample import Request, Sampling, guided, sample, start_noise
from model.text import NO_PROMPT, UnknownWords, Vocabulary
from sora_kernels.packing import Grid, PackedLayout
from sora_kernels.rows import RowMap

SMALL = DiTConfig(
    32, 2, 2, patch=(1, 1, 1), channels=4, rope_axes=(4, 6, 6), vocabulary=9, max_words=6
)
SIZES = [(3, 4, 4), (1, 2, 6), (2, 5, 3)]
WORDS = [[1, 2, 3], [NO_PROMPT], [4, 8, 8, 1, 2]]


def alive(config: DiTConfig = SMALL, seed: int = 0) -> DiT:
    """A model whose zero-initialised weights are random, in fp64, so that everything matters."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config).double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.15 * noise
    return model


def segments(given: int = 0) -> list:
    return [
        clip_segment(len(words), size, SMALL.patch, given if size[0] > given else 0)
        for words, size in zip(WORDS, SIZES, strict=True)
    ]


def latents(parts: list) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(4, part.t, part.h, part.w, generator=generator, dtype=torch.float64)
        for segment in parts
        for part in segment
        if isinstance(part, Grid)
    ]


@torch.no_grad()
def test_packed_equals_one_by_one() -> None:
    model, parts = alive(), segments(given=1)
    x, times = latents(parts), torch.tensor([0.2, 0.9, 0.5])
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    packed = model(x, PackedLayout(parts), words, times)
    alone = []
    rest = list(x)
    for segment, numbers, t in zip(parts, WORDS, times, strict=True):
        mine = [rest.pop(0) for part in segment if isinstance(part, Grid)]
        alone += model(mine, PackedLayout([segment]), torch.tensor(numbers), t[None])
    assert len(packed) == len(alone) == len(x)
    for a, b in zip(packed, alone, strict=True):
        assert a.abs().mean() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_tile_order_changes_nothing() -> None:
    model, parts = alive(), segments()
    x, times = latents(parts), torch.tensor([0.2, 0.9, 0.5])
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    raster = model(x, PackedLayout(parts), words, times)
    tiled = model(x, PackedLayout(parts, order="tile", tile=(1, 2, 2)), words, times)
    for a, b in zip(raster, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_adaln_zero_starts_as_the_identity() -> None:
    """Fresh blocks add nothing: the prediction is zero, words and times have no effect yet."""
    model = DiT(SMALL)
    parts = segments()
    x = [latent.float() for latent in latents(parts)]
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    layout = PackedLayout(parts)
    for prediction in model(x, layout, words, torch.tensor([0.2, 0.9, 0.5])):
        assert torch.equal(prediction, torch.zeros_like(prediction))
    torch.nn.init.normal_(model.head.weight)
    now = model(x, layout, words, torch.tensor([0.2, 0.9, 0.5]))
    later = model(x, layout, words.flip(0), torch.tensor([0.7, 0.1, 0.4]))
    normed = torch.nn.functional.layer_norm(model.patch_in(x[0].flatten(1).mT), (32,), eps=1e-6)
    expected = (normed @ model.head.weight.mT).mT.view_as(x[0])
    torch.testing.assert_close(now[0], expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(now, later, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_every_part_has_its_own_time() -> None:
    parts = segments(given=1)
    layout = PackedLayout(parts)
    rows = rows_for(layout, torch.tensor([0.2, 0.9, 0.5]))
    assert rows.kinds.tolist() == [TEXT, GIVEN, TARGET, TEXT, TARGET, TEXT, GIVEN, TARGET]
    expected = [0, 0, 0.2, 0, 0.9, 0, 0, 0.5]
    torch.testing.assert_close(rows.times, torch.tensor(expected))
    model, x = alive(), latents(parts)
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    before = model(x, layout, words, rows)
    moved = rows.times.clone()
    moved[7] = 0.8  # the last clip's target
    after = model(x, layout, words, Rows(moved, rows.kinds, rows.map))
    changed = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, False, True, True]


@torch.no_grad()
def test_a_row_per_token_is_the_same_as_a_row_per_part() -> None:
    model, parts = alive(), segments(given=1)
    layout, x = PackedLayout(parts), latents(parts)
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    rows = rows_for(layout, torch.tensor([0.2, 0.9, 0.5]))
    owner = layout.part_of_token.long()
    every = RowMap.from_index(torch.arange(layout.num_tokens), layout.num_tokens)
    per_token = Rows(rows.times[owner], rows.kinds[owner], every)
    for a, b in zip(model(x, layout, words, rows), model(x, layout, words, per_token), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_given_frames_and_words_reach_the_target() -> None:
    model, parts = alive(), [clip_segment(3, (3, 2, 2), SMALL.patch, given=1)]
    layout, x = PackedLayout(parts), latents([parts[0]])
    t, words = torch.tensor([0.6]), torch.tensor([1, 2, 3])
    base = model(x, layout, words, t)[1]
    assert not torch.allclose(base, model([x[0] + 1, x[1]], layout, words, t)[1])
    assert not torch.allclose(base, model(x, layout, torch.tensor([2, 1, 3]), t)[1])


def test_gradients_reach_every_parameter() -> None:
    model, parts = alive(), segments(given=1)
    words = torch.tensor([number for numbers in WORDS for number in numbers])
    out = model(latents(parts), PackedLayout(parts), words, torch.tensor([0.2, 0.9, 0.5]))
    sum(v.square().sum() for v in out).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_wrong_words_are_refused() -> None:
    model, parts = alive(), segments()
    with pytest.raises(ValueError, match=r"words: expected \[9\]"):
        model(latents(parts), PackedLayout(parts), torch.tensor([1]), torch.zeros(3))
    long = [clip_segment(7, (1, 2, 2), SMALL.patch)]
    with pytest.raises(ValueError, match="at most 6 a prompt, got 7"):
        model(latents(long), PackedLayout(long), torch.ones(7, dtype=torch.long), torch.zeros(1))
    with pytest.raises(ValueError, match=r"segment_times: expected \[3\]"):
        rows_for(PackedLayout(parts), torch.zeros(2))


def test_segments_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="height"):
        clip_segment(1, (1, 3, 4), (1, 2, 2))
    with pytest.raises(ValueError, match="given"):
        clip_segment(1, (2, 2, 2), (1, 1, 1), given=2)


def test_names_have_the_sizes_of_the_paper() -> None:
    """Depth, width and heads of table 1, and parameters close to its counts (without text)."""
    paper = {"S": 33, "B": 130, "L": 458, "XL": 675}
    for name, millions in paper.items():
        with torch.device("meta"):
            model = DiT(DITS[name])
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert abs(count / millions - 1) < 0.03, (name, count)
    with pytest.raises(ValueError, match="rope_axes"):
        dataclasses.replace(DITS["S"], rope_axes=(16, 16, 16))


# --- sampling ------------------------------------------------------------------------------------


def requests() -> list[Request]:
    return [
        Request(words, size, seed)
        for seed, (words, size) in enumerate(zip(WORDS, SIZES, strict=True))
    ]


def test_a_seed_makes_the_same_clip_again_and_in_any_pack() -> None:
    model, few = alive().float(), Sampling(steps=3, guidance=2.0)
    first = sample(model, requests(), few)
    again = sample(model, requests(), few)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    alone = sample(model, requests()[2:], few)[0]
    torch.testing.assert_close(alone, first[2], rtol=1e-3, atol=1e-3)
    other = sample(model, [dataclasses.replace(requests()[2], seed=7)], few)[0]
    assert not torch.allclose(other, alone, atol=0.1)
    assert torch.equal(start_noise(4, (1, 2, 3), 5), start_noise(4, (1, 2, 3), 5))


def test_given_latents_come_back_unchanged() -> None:
    given = torch.randn(4, 1, 4, 4)
    request = Request([1, 2], (3, 4, 4), given=given)
    (clip,) = sample(alive().float(), [request], Sampling(steps=2))
    assert clip.shape == (4, 3, 4, 4) and torch.equal(clip[:, :1], given)
    wrong = dataclasses.replace(request, given=torch.randn(4, 1, 2, 4))
    with pytest.raises(ValueError, match="given: expected"):
        sample(alive().float(), [wrong], Sampling(steps=2))


@torch.no_grad()
def test_guidance_mixes_two_passes_of_the_model() -> None:
    model, wanted = alive(), requests()
    x = [torch.randn(4, *r.latent, dtype=torch.float64) for r in wanted]
    times = torch.tensor([0.3, 0.6, 0.9])
    free = [dataclasses.replace(r, words=[NO_PROMPT]) for r in wanted]
    with_prompt = guided(model, wanted, 1.0)(x, times)
    without = guided(model, free, 1.0)(x, times)
    mixed = guided(model, wanted, 3.0)(x, times)
    for v, v1, v0 in zip(mixed, with_prompt, without, strict=True):
        torch.testing.assert_close(v, v0 + 3.0 * (v1 - v0), rtol=1e-9, atol=1e-9)


# --- words ---------------------------------------------------------------------------------------


def test_vocabulary_names_the_words_it_does_not_know() -> None:
    vocabulary = Vocabulary(["a", "red", "circle", "moving", "left"])
    assert len(vocabulary) == 6
    assert vocabulary.encode("A red circle, moving left.", 8) == [1, 2, 3, 4, 5]
    with pytest.raises(UnknownWords, match="'zebra', 'galloping'") as error:
        vocabulary.encode("a red zebra galloping left zebra", 8)
    assert error.value.words == ["zebra", "galloping"]
    for prompt, message in (("...", "at least one word"), ("a " * 9, "at most 8"), ("à", "ASCII")):
        with pytest.raises(ValueError, match=message):
            vocabulary.encode(prompt, 8)
    with pytest.raises(ValueError, match="repeated"):
        Vocabulary(["a", "a"])
