"""Training batches: plain text, copying and look-up of hidden secrets, a function of the step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from longswift.tiny import corpus, tasks
from longswift.tiny.tokenizer import END_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batch", "Pool", "make_batch", "make_pool"]

ANSWER_WEIGHT = 4.0
TEXT_WEIGHT = 1.0
QUESTION_WEIGHT = 0.2
# Only the first digit needs the word; the others also follow from the digits before them.
_LONG_ANSWER_WEIGHTS = np.asarray([12.0] + [2.0] * (tasks.DIGITS - 1), dtype=np.float32)
_TOPIC_SHARE = 0.25
# Long rows score only this much of their text: the last layer then skips the rest.
_LONG_ROW, _LONG_SCORED = 1600, 768
_FIRST_FREE = 2
# Up to this length words are rarely alike: the first hurdle is to look anything up at all.
_EASY_ROW = 400

_Maker = Callable[..., tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Pool:
    """Everything the batches are cut from, tokenised once.

    Attributes:
        topics: Token ids of the documentation's prose, ``[topic_tokens]``.
        files: Token ids of the library's source, ``[file_tokens]``.
        words: Token ids of every word a secret may have, each ``[pieces]``.
        parts: Token ids of the fixed parts of a sentence, keyed by role.
        digits: The ids of the digits 0 to 9, ``[10]``.
        vocab_size: Size of the vocabulary.
    """

    topics: np.ndarray
    files: np.ndarray
    words: list[np.ndarray]
    parts: dict[str, np.ndarray]
    digits: np.ndarray
    vocab_size: int


@dataclass(frozen=True)
class Batch:
    """Token ids ``[rows, length + 1]`` and the weight of predicting each one, same shape."""

    ids: np.ndarray
    weights: np.ndarray


def make_pool(
    tokenizer: PreTrainedTokenizerFast, *, limit: int | None = None, words: int = 60_000
) -> Pool:
    """Tokenise the training split, the words and the fixed parts of a sentence.

    Args:
        tokenizer: The tokenizer of the model.
        limit: Characters read of each document; everything by default.
        words: How many words to prepare, half of them invented.
    """

    def encode(text: str) -> np.ndarray:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    end = np.asarray([END_ID], dtype=np.int32)
    topics: list[np.ndarray] = []
    files: list[np.ndarray] = []
    seen: set[str] = set()
    for name, body in corpus.documents("train"):
        (topics if name.startswith("topic:") else files).extend([encode(body[:limit]), end])
        seen.update(body[:limit].replace("_", " ").split())
    rng = random.Random(0)
    known = sorted(w for w in seen if w.isascii() and w.isalpha() and 3 <= len(w) <= 12)
    known = rng.sample(known, min(len(known), words // 2))
    invented = {tasks.made_up_word(rng) for _ in range(words - len(known))}
    encoded = tokenizer([f" {w}" for w in known + sorted(invented)], add_special_tokens=False)[
        "input_ids"
    ]
    stem = tasks.question("").removesuffix("  is")
    return Pool(
        topics=np.concatenate(topics),
        files=np.concatenate(files),
        words=[np.asarray(ids, dtype=np.int32) for ids in encoded],
        parts={
            "stem": encode(stem),
            "is": encode(" is"),
            "space": encode(" "),
            "stop": encode("."),
        },
        digits=np.concatenate([encode(str(d)) for d in range(10)]),
        vocab_size=len(tokenizer),
    )


def _stretch(pool: Pool, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``size`` consecutive tokens of real text from a random place."""
    source = pool.topics if rng.random() < _TOPIC_SHARE else pool.files
    if len(source) <= size:
        source = np.tile(source, size // len(source) + 2)
    start = int(rng.integers(len(source) - size))
    return source[start : start + size]


class _Row:
    """A sequence under construction, with the weight of each token."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.ids: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        # Callers may cut a document anywhere, so the first token is left out now and then.
        if rng.random() < 0.9:
            self.add(np.asarray([END_ID], dtype=np.int32), 0.0)

    def add(self, ids: np.ndarray, weight: float | np.ndarray) -> None:
        self.ids.append(ids)
        self.weights.append(np.full(len(ids), weight, dtype=np.float32))

    def __len__(self) -> int:
        return sum(map(len, self.ids))

    def close(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.ids)[:size], np.concatenate(self.weights)[:size]


def _scored(size: int, rng: np.random.Generator, share: int = 0) -> np.ndarray:
    """Return 1 where a stretch of text is scored: all of a short one, a sample of a long one."""
    if size <= _LONG_ROW:
        return np.ones(size, dtype=np.float32)
    return (rng.random(size) < max(share, _LONG_SCORED) / size).astype(np.float32)


def _text_row(
    pool: Pool, size: int, rng: np.random.Generator, *, whole: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    row = _Row(rng)
    words = _stretch(pool, size, rng)
    row.add(words, TEXT_WEIGHT if whole else _scored(size, rng, size // 4))
    return row.close(size)


def _copy_row(pool: Pool, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Repeat passages, random or real, after a gap of real text."""
    row = _Row(rng)
    while len(row) < size:
        span = int(rng.integers(8, 65))
        if rng.random() < 0.7:
            passage = rng.integers(_FIRST_FREE, pool.vocab_size, span, dtype=np.int32)
        else:
            passage = _stretch(pool, span, rng)
        row.add(passage, 0.0)
        for _ in range(int(rng.integers(1, 4))):
            if rng.random() < 0.6:
                gap = _stretch(pool, int(rng.integers(1, max(2, size // 4))), rng)
                row.add(gap, 0.2 if size <= _LONG_ROW else 0.0)
            row.add(passage[:1], 0.0)
            row.add(passage[1:], 1.0)
    return row.close(size)


def _words(pool: Pool, count: int, rng: np.random.Generator, *, hard: bool) -> list[np.ndarray]:
    """Draw distinct words; some share all but one piece with another, to demand a full match."""
    chosen: dict[bytes, np.ndarray] = {}
    while len(chosen) < count:
        word = pool.words[int(rng.integers(len(pool.words)))]
        if chosen and rng.random() < (0.4 if hard else 0.15):
            other = list(chosen.values())[int(rng.integers(len(chosen)))]
            if hard and len(other) > 1 and len(chosen) % 2:
                word = np.concatenate([other[:-1], word[-1:]])
            elif len(word) > 1:
                word = np.concatenate([other[:1], word[1:]])
        chosen[word.tobytes()] = word
    return list(chosen.values())


def _secret_row(
    pool: Pool, size: int, rng: np.random.Generator, *, packed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Hide secrets in real text, or in next to none if ``packed``, and ask for them at the end."""
    most = max(1, min(96, size // 44))
    # Both few and many secrets at every length: one alone in a long text is a task of its own.
    long = size > _LONG_ROW
    fewest = min(8, most) if long and rng.random() < 0.7 else 1
    keys = int(np.exp(rng.uniform(np.log(fewest), np.log(most + 1))))
    asked = min(max(1, size // 60), 128)
    if packed:
        long, keys, asked = True, int(rng.integers(4, max(5, size // 32))), size
    words = _words(pool, keys, rng, hard=size > _EASY_ROW)
    numbers = pool.digits[rng.integers(0, 10, (keys, tasks.DIGITS))]
    parts = pool.parts

    def cost(word: np.ndarray) -> int:
        fixed = sum(map(len, parts.values()))
        return fixed + len(word) + tasks.DIGITS

    order = rng.permutation(keys)[:asked]
    if keys < asked and not packed and rng.random() < 0.5:
        # Asking the same few again gives long texts with few secrets a useful signal too.
        order = rng.choice(keys, min(asked, 2 * keys))
    free = size - 1 - sum(map(cost, words)) - sum(cost(words[i]) for i in order)
    while free < keys and len(order) > 1:
        free += cost(words[order[-1]])
        order = order[:-1]
    filler = _stretch(pool, max(free, 1), rng)
    # Weighted so that the text counts about as much as the answers, whatever the length.
    answers = ANSWER_WEIGHT * (tasks.DIGITS + 2) * len(order)
    scored = _scored(len(filler), rng)
    text_weights = scored * min(0.5, 1.2 * answers / max(1.0, scored.sum()))
    row = _Row(rng)
    cuts = np.sort(rng.integers(0, len(filler) + 1, keys))
    if rng.random() < 0.1:
        cuts[0] = 0
    last = 0
    for word, number, cut in zip(words, numbers, cuts, strict=True):
        row.add(filler[last:cut], text_weights[last:cut])
        for ids in (parts["stem"], word, parts["is"], parts["space"], number, parts["stop"]):
            row.add(ids, 0.0 if long or ids is number or ids is word else 0.1)
        last = cut
    row.add(filler[last:], text_weights[last:])
    for i in order:
        for ids in (parts["stem"], words[i], parts["is"]):
            row.add(ids, QUESTION_WEIGHT if ids is not words[i] else 0.0)
        row.add(parts["space"], QUESTION_WEIGHT)
        row.add(numbers[i], _LONG_ANSWER_WEIGHTS if long else ANSWER_WEIGHT)
        row.add(parts["stop"], QUESTION_WEIGHT)
    return row.close(size)


def _stream_row(
    pool: Pool, size: int, rng: np.random.Generator, *, bare: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """State numbers of words one after another, and state some of them again.

    The densest exercise in telling words apart: every repeated statement is a question, at first
    with few words to choose among. Short forms leave out the first words of the sentence. If
    ``bare``, random words have one piece and numbers one digit, with nothing, a space or all of the
    usual between them: who repeats what it has read can do the first, and each form helps the next.
    """
    row, parts = _Row(rng), pool.parts
    between: tuple[np.ndarray, ...] = (parts["is"], parts["space"])
    with_stem, pieces = rng.random() < 0.4, int(rng.integers(1, 5))
    digits, again = int(rng.integers(1, tasks.DIGITS + 1)), rng.uniform(0.4, 0.75)
    if bare:
        with_stem, pieces, digits = False, 1, 1
        between = between[int(rng.choice((0, 0, 1, 2))) :]
    weights: np.ndarray = np.full(digits, 1.0, dtype=np.float32)
    weights[0] = ANSWER_WEIGHT
    known: list[tuple[np.ndarray, np.ndarray]] = []
    while len(row) < size:
        asked = bool(known) and rng.random() < again
        if asked:
            word, number = known[int(rng.integers(len(known)))]
        else:
            if rng.random() < 0.5:
                word = rng.integers(_FIRST_FREE, pool.vocab_size, pieces, dtype=np.int32)
            else:
                word = pool.words[int(rng.integers(len(pool.words)))]
            number = pool.digits[rng.integers(0, 10, digits)]
            known.append((word, number))
        if with_stem:
            row.add(parts["stem"], 0.0)
        for ids in (word, *between):
            row.add(ids, 0.0)
        row.add(number, weights if asked else 0.0)
        row.add(parts["stop"], QUESTION_WEIGHT)
    return row.close(size)


def _makers(kind: str) -> tuple[_Maker, ...]:
    packed: _Maker = partial(_secret_row, packed=True)
    whole: _Maker = partial(_text_row, whole=True)
    bare: _Maker = partial(_stream_row, bare=True)
    kinds: dict[str, tuple[_Maker, ...]] = {
        "mixed": (_secret_row, _text_row, _secret_row, _copy_row, _secret_row, _text_row),
        "dense": (_secret_row, _text_row, _secret_row, _copy_row, _secret_row, _secret_row),
        "sentences": (packed, _text_row, _secret_row, _copy_row, packed, _text_row),
        "copies": (_copy_row, _text_row, _copy_row),
        "bare": (bare, _copy_row, bare, _text_row, bare, bare),
        "streams": (_stream_row, _text_row, _stream_row, _copy_row, packed, _secret_row),
        "texts": (_text_row, _secret_row, _text_row),
        "whole": (whole, _secret_row, whole, whole),
        "packed": (packed, _text_row, packed, packed, packed, packed),
    }
    if kind not in kinds:
        raise ValueError(f"expected a kind among {list(kinds)}, got {kind!r}; use one of those")
    return kinds[kind]


def make_batch(
    pool: Pool, rows: int, length: int, seed: int, step: int, *, kind: str = "mixed"
) -> Batch:
    """Build the batch of a step: the same arguments always give the same batch.

    Args:
        pool: The tokenised material.
        rows: Sequences in the batch.
        length: Tokens predicted per sequence.
        seed: Seed of the whole run.
        step: Number of the step.
        kind: What the rows hold, see :class:`longswift.tiny.config.Stage`.
    """
    rng = np.random.default_rng([seed, step])
    ids: np.ndarray = np.full((rows, length + 1), END_ID, dtype=np.int64)
    weights: np.ndarray = np.zeros((rows, length + 1), dtype=np.float32)
    makers = _makers(kind)
    # The mix is stratified over steps, because a long step has only one or two rows.
    for i in range(rows):
        make = makers[(step * rows + i) % len(makers)]
        row_ids, row_weights = make(pool, length + 1, rng)
        ids[i, : len(row_ids)] = row_ids
        weights[i, : len(row_weights)] = row_weights
    return Batch(ids, weights)
