"""Common words: which ten words stand most often in a long numbered list?

RULER's ``cwe`` with its numbers: 10 common words 30 times each, the others 3 times; below 4,096
tokens 6 times and once; one worked example (40 words, 10 and 3 times; below 4,096 tokens 20 words,
3 times and once). Every part of the text matters, so it shows what an average over keys loses
where needles do not. Differences from RULER: our own sentences; words from Python's documentation,
and invented ones when those do not suffice, instead of a list of English words. Where nothing is
instructed, the worked example alone shows what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack

_SHORT = 4096
_ASKED = "Question: Which {n} words stand most often in the list?"
_BEGUN = " The {n} most frequent words are:"


@dataclass(frozen=True, kw_only=True)
class CommonWords(base.Task):
    """A list of words, a few of them frequent.

    Attributes:
        common: Number of common words.
        common_times: How often each stands in the list; 6 below 4,096 tokens if None, else 30.
        other_times: How often every other one does; 1 below 4,096 tokens if None, else 3.
    """

    name: ClassVar[str] = "common_words"

    common: int = 10
    common_times: int | None = None
    other_times: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for length in (0, _SHORT):
            often, seldom = self._times(length)
            check_positive(self.name, common=self.common, common_times=often, other_times=seldom)
            if often <= seldom:
                raise ConfigError(
                    problem(
                        f"{self.name}.common_times",
                        expected=f"more than other_times ({seldom})",
                        got=often,
                        fix="Common words must stand out.",
                    )
                )

    def _times(self, length: int) -> tuple[int, int]:
        usual = (6, 1) if length < _SHORT else (30, 3)
        often, seldom = self.common_times, self.other_times
        return usual[0] if often is None else often, usual[1] if seldom is None else seldom

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        short = length < _SHORT
        count, times = (20, (3, 1)) if short else (40, (10, 3))
        example, common = _listing(rng, max(count, 2 * self.common), self.common, *times)
        asked = f"\n{_ASKED}\n" if form == base.INSTRUCT else "\n"
        after = (asked + _BEGUN[1:]).format(n=self.common)
        shown = f"Numbered words:\n{example}{after} {', '.join(common)}\n\nNumbered words:\n"
        if form == base.INSTRUCT:
            before, tail = codec.frame(
                "Count how often each word stands in the numbered lists.\n\n" + shown,
                asked.format(n=self.common).rstrip(),
                _BEGUN.format(n=self.common),
            )
        else:
            before, tail = [*codec.begin(), *codec.encode(shown)], codec.encode(after)

        seed, often_seldom = rng.random(), self._times(length)

        def document(others: int) -> tuple[list[int], list[str]]:
            listing, words = _listing(
                Random(seed), self.common + others, self.common, *often_seldom
            )
            return codec.encode(listing), words

        limit = 2 * len(codec.encode(", ".join(document(1)[1])))
        room = length - len(before) - len(tail) - limit
        # A number, a full stop and a word are three tokens or more.
        bound = room // (3 * often_seldom[1])
        others = _most(lambda n: len(document(n)[0]) <= room, bound)
        if others == 0:
            raise base.too_short(self, length)
        ids, words = document(others)
        question = base.Question(ids=tuple(tail), answers=tuple(words), limit=limit)
        return base.Sample(
            document=(*before, *ids),
            questions=(question,),
            meta={"form": form, "words": self.common + others},
        )

    def score(self, sample: base.Sample, output: base.Output) -> list[base.Score]:
        """Share of the common words that the text names."""
        return base.named(sample, output)


def _listing(
    rng: Random, count: int, common: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    """A shuffled numbered list of ``count`` different words, and its common ones."""
    known = haystack.english()
    # Drawn first, so that they do not depend on how many others there are.
    words = rng.sample(known, common)
    rest = [word for word in known if word not in words]
    words += rng.sample(rest, min(count - common, len(rest)))
    used = set(known)
    while len(words) < count:
        words.append(haystack.new_word(rng, used))
    listed = words[:common] * often + words[common:] * seldom
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), words[:common]


def _most(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to ``bound`` that fits, 0 if not even 1 does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
