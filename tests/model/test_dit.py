"""The DiT: packing changes nothing, adaLN-Zero starts as the identity, every part has its time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.condition import GIVEN, TARGET, TEXT, Given, Rows, clip_segment, rows_for
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


def known(frames: int, size: tuple[int, int, int], time: float = 0.0) -> Given:
    return Given(torch.zeros(4, frames, *size[1:]), time)


def segments(given: int = 0) -> list:
    return [
        clip_segment(
            len(words), size, SMALL.patch, [known(given, size)] if 0 < given < size[0] else []
        )
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
    model, parts = alive(), [clip_segment(3, (3, 2, 2), SMALL.patch, [known(1, (3, 2, 2))])]
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
    with pytest.raises(ValueError, match="time: expected a finite"):
        known(1, (2, 2, 2), time=float("nan"))
    with pytest.raises(ValueError, match="step: expected a positive"):
        dataclasses.replace(known(1, (2, 2, 2)), step=0.0)


def test_positions_are_the_true_times_of_the_pixels() -> None:
    """Angles that the model's own layout gives, against times and places counted in pixels."""
    main = (3, 4, 6)
    cases = [
        (known(2, main, -5), [-1.25, -0.25]),  # frames -5 to -1: latents end at -5 and -1
        (known(2, main, 9), [2.25, 3.25]),  # 9 frames are made; frame 9 follows
        (known(1, main, 2.5), [0.625]),
        (dataclasses.replace(known(3, main, 1), step=0.5), [0.25, 0.75, 1.25]),
        (known(1, (1, 2, 3), 0), [0.0]),  # the same picture at half the size
    ]
    for given, times in cases:
        layout = PackedLayout([clip_segment(0, main, (1, 1, 1), [given])])
        rope = layout.rope((2, 2, 2), frequencies=((1.0,), (0.5,), (0.25,)))
        size = given.latent.shape[1:]
        factor = main[1] / size[1]
        down = (torch.arange(size[1]) + 0.5) * factor - 0.5  # centres, in latents of the clip
        right = (torch.arange(size[2]) + 0.5) * factor - 0.5
        grid = torch.meshgrid(torch.tensor(times), down, right, indexing="ij")
        angles = torch.stack([g.flatten() * f for g, f in zip(grid, (1, 0.5, 0.25), strict=True)])
        rows, count = rope.position_index, angles.shape[1]
        got = torch.stack([rope.cos[rows[:count, a].long(), a] for a in range(3)])
        torch.testing.assert_close(got, angles.cos(), rtol=0, atol=1e-6)
        got = torch.stack([rope.sin[rows[:count, a].long(), a] for a in range(3)])
        torch.testing.assert_close(got, angles.sin(), rtol=0, atol=1e-6)


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


def test_given_parts_guide_the_clip_that_is_made() -> None:
    few, model = Sampling(steps=2), alive().float()
    given = Given(torch.randn(4, 1, 4, 4), 0.0)
    request = Request([1, 2], (3, 4, 4), given=[given])
    (clip,) = sample(model, [request], few)
    assert clip.shape == (4, 3, 4, 4) and torch.equal(clip[:, :1], given.latent)
    for other in (
        dataclasses.replace(request, given=[]),
        dataclasses.replace(request, given=[dataclasses.replace(given, time=4.0)]),
        dataclasses.replace(request, given=[Given(given.latent + 1, 0.0)]),
    ):
        assert not torch.allclose(sample(model, [other], few)[0][:, 1:], clip[:, 1:], atol=0.01)
    wrong = dataclasses.replace(request, given=[Given(torch.randn(3, 1, 4, 4), 0.0)])
    with pytest.raises(ValueError, match="given, source: expected 4 channels, got 3"):
        sample(model, [wrong], few)


def test_a_walk_may_start_from_a_noised_source() -> None:
    """SDEdit: with little strength the source comes back, with strength 1 it has no say."""
    few, model = Sampling(steps=3, guidance=1.0), alive().float()
    source = torch.randn(4, 3, 4, 4)

    def edited(strength: float) -> torch.Tensor:
        request = Request([1, 2], (3, 4, 4), source=source, strength=strength)
        return sample(model, [request], few)[0]

    torch.testing.assert_close(edited(1e-6), source, rtol=0, atol=1e-4)
    errors = [float((edited(s) - source).square().mean()) for s in (1e-6, 0.3, 1.0)]
    assert errors[0] < errors[1] < errors[2]
    (free,) = sample(model, [Request([1, 2], (3, 4, 4))], few)
    torch.testing.assert_close(edited(1.0), free, rtol=1e-5, atol=1e-5)
    for strength in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"strength: expected a number in \(0, 1\]"):
            edited(strength)
    with pytest.raises(ValueError, match="source: expected a latent"):
        Request([1], (2, 4, 4), source=source)


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
