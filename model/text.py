"""Prompts become word numbers of a closed vocabulary.

The world that trains the model speaks a small language (`model.world.VOCABULARY`, its synonyms
resolved by `model.world.words`), so a learned word embedding says all there is to say, and a prompt
that leaves the language is an error that names the words, never a silent guess. Word 0 is "no
prompt": the unconditional half of guidance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model.world import words as split_words

NO_PROMPT = 0


class UnknownWords(ValueError):
    """The prompt holds words outside the vocabulary; `.words` lists them in order."""

    def __init__(self, words: Sequence[str], known: Sequence[str]) -> None:
        self.words = list(words)
        listed = ", ".join(repr(word) for word in words)
        super().__init__(
            f"prompt holds unknown word{'s' if len(words) > 1 else ''} {listed}; "
            f"the model knows: {' '.join(sorted(known))}"
        )


class Vocabulary:
    """Words <-> numbers. Number 0 means "no prompt", word i of the list is number i + 1."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._number = {word: i + 1 for i, word in enumerate(self.words)}
        if len(self._number) != len(self.words):
            raise ValueError("words: expected each word once, got a repeated word")

    def __len__(self) -> int:
        """How many numbers there are, "no prompt" included."""
        return len(self.words) + 1

    def encode(self, prompt: str, max_words: int) -> list[int]:
        """Numbers of the words of `prompt`, 1 to `max_words` of them.

        Raises `UnknownWords` for words outside the vocabulary, and `ValueError` for a prompt that
        holds no word, a character that is no part of a word, or more than `max_words` words.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
        strange = sorted({c for c in prompt if ord(c) > 127 and not c.isspace()})
        if strange:
            raise ValueError(f"prompt: expected plain ASCII words, got {''.join(strange)!r}")
        words = split_words(prompt)
        if not words:
            raise ValueError(f"prompt: expected at least one word, got {prompt!r}")
        unknown = list(dict.fromkeys(word for word in words if word not in self._number))
        if unknown:
            raise UnknownWords(unknown, self.words)
        if len(words) > max_words:
            raise ValueError(f"prompt: expected at most {max_words} words, got {len(words)}")
        return [self._number[word] for word in words]


def vocabulary_of(text: str, words: Iterable[str]) -> Vocabulary:
    """What turns prompts into numbers for a model with that `DiTConfig.text`.

    words: of the closed vocabulary; "minilm" brings its own.
    """
    if text == "words":
        return Vocabulary(words)
    from model import minilm  # reads the files of an optional package

    return minilm.word_pieces()


def text_inputs(text: str, prompts: Sequence[Sequence[int]]) -> Tensor:
    """What the DiT takes for prompts in packed order, given as numbers of their words.

    "words": these numbers, int64 [n]. "minilm": the frozen encoder's states, fp32
    [n, minilm.WIDTH + 1]; the last one of a row says "no prompt".
    """
    if text == "words":
        return torch.tensor([n for prompt in prompts for n in prompt], dtype=torch.int64)
    from model import minilm

    return torch.cat([minilm.rows_of(tuple(prompt)) for prompt in prompts])
