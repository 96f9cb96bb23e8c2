"""Secrets hidden in a document: the sentences, the words and the questions about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

__all__ = ["DIGITS", "Hidden", "hide_secrets", "insert", "made_up_word", "question", "statement"]

DIGITS = 5

_STEM = " The secret number of"
_CLUSTERS = ("bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "st", "th", "tr")
_ONSETS = (*"bcdfghjklmnprstvwz", *_CLUSTERS)
_VOWELS = (*"aeiouaeio", "ai", "ea", "ee", "oo", "ou")
_CODAS = ("", "", "", *"lmnrstx", "nd", "rk")
# The trainer invents no word with one of these, so a score shows look-up and not memory.
HELD_OUT_SYLLABLES = ("zor", "quib", "vex", "jun", "plim", "drax", "wob", "fyn", "kelt", "mur")


def question(word: str) -> str:
    """Return the text that asks for a word's number; the answer follows it directly."""
    return f"{_STEM} {word} is"


def statement(word: str, number: str) -> str:
    """Return the sentence that hides a word's number."""
    return f"{question(word)} {number}."


def made_up_word(rng: random.Random, *, held_out: bool = False) -> str:
    """Return a pronounceable invented word, from syllables the trainer lacks if ``held_out``."""
    if held_out:
        known = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        return "".join(rng.sample((known, rng.choice(HELD_OUT_SYLLABLES)), 2))
    while True:
        parts = [
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
            for _ in range(rng.choice((1, 2, 2, 2, 3)))
        ]
        word = "".join(parts)
        if len(word) > 2 and not any(s in word for s in HELD_OUT_SYLLABLES):
            return word


@dataclass(frozen=True)
class Hidden:
    """A document with secrets in it.

    Attributes:
        document: The text, or the token ids, with the sentences inserted.
        words: The secret's word, in the order in which the questions ask.
        questions: One question per secret, as text, to append to the document.
        answers: The digits that answer each question.
        depths: Where each sentence starts, as a fraction of the original document.
    """

    document: Any
    words: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]


@overload
def hide_secrets(
    document: str, n: int, *, seed: int = 0, depths: Sequence[float] | None = None
) -> Hidden: ...


@overload
def hide_secrets(
    document: Sequence[int],
    n: int,
    *,
    seed: int = 0,
    depths: Sequence[float] | None = None,
    encode: Callable[[str], list[int]],
) -> Hidden: ...


def hide_secrets(
    document: str | Sequence[int],
    n: int,
    *,
    seed: int = 0,
    depths: Sequence[float] | None = None,
    encode: Callable[[str], list[int]] | None = None,
) -> Hidden:
    """Hide ``n`` secrets in a document, the same ones for the same seed.

    Args:
        document: Text, or token ids of shape ``[length]``.
        n: How many secrets, each under a word of its own.
        seed: Chooses words, numbers, order and, unless given, the depths.
        depths: One place per secret from 0 (start) to 1 (end); spread at random by default.
        encode: Turns a sentence into token ids; needed when ``document`` holds ids.

    Returns:
        The document with the secrets, the questions and the answers.

    Raises:
        ValueError: If ``n`` or ``depths`` do not fit, or ids come without ``encode``.
    """
    if n < 1:
        raise ValueError(f"expected at least one secret, got n={n}; pass n >= 1")
    if not isinstance(document, str) and encode is None:
        raise ValueError("expected encode= with token ids, got none; pass the tokenizer's encode")
    rng = random.Random(seed)
    if depths is None:
        # One place per n-th of the document, so that many secrets cover it evenly.
        depths = [(i + rng.random()) / n for i in range(n)]
    if len(depths) != n or not all(0 <= d <= 1 for d in depths):
        raise ValueError(f"expected {n} depths in [0, 1], got {list(depths)}; pass one per secret")

    plain = document if isinstance(document, str) else ""
    words: list[str] = []
    while len(words) < n:
        word = made_up_word(rng, held_out=True)
        if word not in words and word not in plain:
            words.append(word)
    numbers = [f"{rng.randrange(10**DIGITS):0{DIGITS}d}" for _ in range(n)]

    size = len(document)
    places = [round(d * size) for d in depths]
    if isinstance(document, str):
        # A sentence begins at the next space, so that no word of the document is cut.
        places = [_next_space(document, p) for p in places]
    sentences = [statement(*pair) for pair in zip(words, numbers, strict=True)]
    whole = insert(document, sentences if encode is None else map(encode, sentences), places)

    order = list(range(n))
    rng.shuffle(order)
    return Hidden(
        document=whole,
        words=tuple(words[i] for i in order),
        questions=tuple(question(words[i]) for i in order),
        answers=tuple(numbers[i] for i in order),
        depths=tuple(places[i] / max(size, 1) for i in order),
    )


def insert(document: Any, pieces: Iterable[Any], places: Sequence[int]) -> Any:
    """Return a document with a piece at each place, counted before anything was inserted.

    Args:
        document: Text, or token ids.
        pieces: Texts, or lists of token ids; at equal places they keep their order.
        places: One index into ``document`` per piece.
    """
    parts, last = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        parts += [document[last:place], piece]
        last = place
    parts.append(document[last:])
    return "".join(parts) if isinstance(document, str) else [t for part in parts for t in part]


def _next_space(text: str, start: int) -> int:
    for place in range(start, min(start + 200, len(text))):
        if text[place].isspace():
            return place
    return start
