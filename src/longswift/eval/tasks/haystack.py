"""Text to hide things in, and hiding them: at the ends of sentences, by token."""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle, islice

from longswift.core.errors import ConfigError, problem
from longswift.eval.documents import source
from longswift.eval.models import Codec
from longswift.tiny import tasks as secrets

TEXT, NOISE, NEEDLES = "text", "noise", "needles"
_NOISE = (
    " The kettle is on. The street is quiet. The rain has stopped. Somebody waits at the corner."
    " Nothing else happened."
)


@lru_cache(maxsize=4)
def _tokens(codec: Codec, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where its sentences and lines end."""
    ids = codec.encode(text)
    return ids, _sentence_ends(codec, ids)


def _sentence_ends(codec: Codec, ids: list[int]) -> list[int]:
    pieces = {token: codec.decode([token]) for token in set(ids)}
    ending = {t for t, p in pieces.items() if "\n" in p or p.rstrip().endswith((".", "!", "?"))}
    ends = [place for place, token in enumerate(ids, 1) if token in ending]
    return sorted({0, *ends, len(ids)})


def _plain(codec: Codec) -> Codec:
    """The tokenizer alone, so that no cache keeps a model alive."""
    return Codec(tokenizer=codec.tokenizer, vocabulary=codec.vocabulary)


def text_tokens(codec: Codec, file: str | None) -> list[int]:
    """Token ids of the whole text: the user's file, or Python's documentation."""
    return _tokens(_plain(codec), source(file))[0]


def filler(codec: Codec, kind: str, file: str | None, room: int, rng: random.Random) -> list[int]:
    """``room`` tokens of text from a random place, or of the same few sentences again and again.

    A text that is too short is repeated.
    """
    plain = _plain(codec)
    if kind == NOISE:
        return list(islice(cycle(_tokens(plain, _NOISE)[0]), room))
    ids, ends = _tokens(plain, source(file))
    late = max(0, len(ids) - room)
    start = rng.choice([e for e in ends if e <= late] or [0])
    return list(islice(cycle(ids[start:] + ids[:start]), room))


def check_kind(owner: str, kind: str, allowed: Sequence[str] = (TEXT, NOISE)) -> None:
    """Refuse an unknown kind of haystack."""
    if kind not in allowed:
        raise ConfigError(
            problem(
                f"{owner}.haystack",
                expected=f"one of {', '.join(allowed)}",
                got=repr(kind),
                fix="Pick one.",
            )
        )


def plant(
    codec: Codec, ids: list[int], pieces: Sequence[list[int]], depths: Sequence[float]
) -> list[int]:
    """``ids`` with every piece at the sentence end nearest to its depth in [0, 1]."""
    ends = _sentence_ends(codec, ids)
    places = []
    for depth in depths:
        wanted = depth * len(ids)
        right = min(bisect_left(ends, wanted), len(ends) - 1)
        near = ends[max(0, right - 1) : right + 1]
        places.append(min(near, key=lambda end: abs(end - wanted)))
    planted: list[int] = secrets.insert(ids, pieces, places)
    return planted


def fill(codec: Codec, make: Callable[[], str], room: int) -> list[list[int]]:
    """As many texts of ``make`` as fit into ``room`` tokens, as token ids."""
    items: list[list[int]] = []
    while True:
        ids = codec.encode(make())
        room -= len(ids)
        if room < 0:
            return items
        items.append(ids)


def grid(depths: int, index: int) -> float:
    """Depth number ``index`` on an even grid from 0 (start) to 1 (end), over and over.

    Neighbouring numbers lie far apart, so that a few samples cover the document, too.
    """
    if depths == 1:
        return 0.5
    golden = round(depths * 0.618)
    stride = next(s for s in range(golden, depths + golden) if math.gcd(s, depths) == 1)
    return index * stride % depths / (depths - 1)


def nearest(depths: int, depth: float) -> float:
    """The grid's depth nearest to ``depth``."""
    return 0.5 if depths == 1 else round(depth * (depths - 1)) / (depths - 1)


def new_word(rng: random.Random, used: set[str]) -> str:
    """An invented word, unknown to the tiny model's training and to ``used``, where it is added."""
    while True:
        word = secrets.made_up_word(rng, held_out=True)
        if word not in used:
            used.add(word)
            return word


def digits(rng: random.Random, count: int) -> str:
    """A number of exactly ``count`` digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


@lru_cache(maxsize=1)
def english() -> tuple[str, ...]:
    """Lower-case words of four to twelve letters in Python's documentation, sorted."""
    from longswift.tiny import corpus

    prose = [
        body
        for split in corpus.SPLITS
        for name, body in corpus.documents(split)
        if name.startswith("topic:")
    ]
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,12}\b", "\n".join(prose)))))
