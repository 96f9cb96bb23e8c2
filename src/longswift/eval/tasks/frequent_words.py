"""Frequent words: which three of many coded words appear most often?

RULER's ``fwe`` with its numbers: made-up words of six letters whose frequencies fall like
``rank ** -2`` (a zeta distribution), one word for every 50 tokens of the length; the most frequent
one is replaced by dots, the next three are asked. Differences from RULER: our own sentences.
Where nothing is instructed, the list is followed by the beginning of the answer.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval.models import Codec
from longswift.eval.tasks import base

_LETTERS, _TOKENS_A_WORD, _DOTS = 6, 50, "..."
_TERMS = 10_000


@dataclass(frozen=True, kw_only=True)
class FrequentWords(base.Task):
    """A text of coded words with falling frequencies.

    Attributes:
        alpha: Exponent of the zeta distribution, above 1; smaller is harder.
        asked: How many words are asked.
    """

    name: ClassVar[str] = "frequent_words"

    alpha: float = 2.0
    asked: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, asked=self.asked)
        if not isinstance(self.alpha, (int, float)) or not self.alpha > 1:
            raise ConfigError(
                problem(
                    f"{self.name}.alpha",
                    expected="a number above 1",
                    got=repr(self.alpha),
                    fix="RULER uses 2.0.",
                )
            )

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        words: list[str] = []
        while len(words) < max(self.asked + 2, length // _TOKENS_A_WORD):
            word = "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))
            if word not in words:
                words.append(word)
        shown, answers = [_DOTS, *words[1:]], words[1 : 1 + self.asked]
        begun = f" The {self.asked} most frequent coded words are:"
        if form == base.INSTRUCT:
            before, after = codec.frame(
                "Count the coded words in the text below.\n\n",
                f"\n\nQuestion: Leaving the dots aside, which {self.asked} coded words appear most "
                "often? Answer with the words alone.",
                begun,
            )
        else:
            before, after = codec.begin(), codec.encode("\n" + begun[1:])
        limit = 2 * len(codec.encode(" " + ", ".join(answers)))
        room = length - len(before) - len(after) - limit

        total = zeta(self.alpha)
        sizes = [len(codec.encode(f" {word}")) for word in shown]
        # The number of words whose tokens fill the room, and one less as long as rounding misses.
        shares = [rank**-self.alpha / total for rank in range(1, len(shown) + 1)]
        count = int(room / sum(s * n for s, n in zip(shares, sizes, strict=True))) + 1
        while True:
            times = [int(count * share) for share in shares]
            if times[self.asked] <= times[self.asked + 1]:
                raise base.too_short(self, length)
            if sum(t * n for t, n in zip(times, sizes, strict=True)) <= room:
                break
            count -= 1
        listed = [word for word, n in zip(shown, times, strict=True) for _ in range(n)]
        rng.shuffle(listed)
        pieces = {word: codec.encode(f" {word}") for word in shown}
        question = base.Question(ids=tuple(after), answers=tuple(answers), limit=limit)
        return base.Sample(
            document=(*before, *(token for word in listed for token in pieces[word])),
            questions=(question,),
            meta={"form": form, "words": len(listed)},
        )

    def score(self, sample: base.Sample, output: base.Output) -> list[base.Score]:
        """Share of the asked words that the text names."""
        return base.named(sample, output)


def zeta(alpha: float) -> float:
    """Riemann's zeta function: a partial sum, and the rest as an integral, once corrected."""
    partial = sum(k**-alpha for k in range(1, _TERMS))
    return partial + _TERMS ** (1 - alpha) / (alpha - 1) + _TERMS**-alpha / 2
