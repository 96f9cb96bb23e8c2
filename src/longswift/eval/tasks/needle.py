"""Needles in a haystack: sentences with a number, hidden at a depth and asked for at the end.

RULER's retrieval tasks (Hsieh et al., 2024, arXiv 2404.06654), with their numbers: one key, value
and question (``niah_single``); 4 keys of which one is asked (``niah_multikey_1``), or nothing but
needles (``haystack="needles"``, ``niah_multikey_2``; with ``value="uuids"`` close to
``niah_multikey_3``); 4 values of one key; 4 keys, all asked. Differences from RULER:

* the sentences are ours: `` The secret number of WORD is 4821357.``; keys are invented words
  instead of adjective-noun pairs, and stay words in ``niah_multikey_3``'s place;
* the text is Python's documentation or a file instead of essays, from a random place; the noise
  consists of other sentences;
* the asked needle lies on an even grid of ``depths`` (10) by the number of the sample, so that each
  depth gets equally many; the others lie on RULER's grid of 40 at random;
* a depth is reported as the nearest of the grid; every answer counts at its own depth;
* one token sequence of exactly ``length`` instead of the longest one in steps of the haystack;
* ``continuation`` and ``key_value`` forms, where each key (and value) is a question of its own. A
  key with several values is asked for each of them behind sentences that tell all the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar
from uuid import UUID

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack
from longswift.tiny import tasks as secrets
from longswift.tiny.tasks import DIGITS

_VALUES = {"numbers": "number", "uuids": "code"}
_OTHER_DEPTHS = 40
_LIMIT = 128


@dataclass(frozen=True, kw_only=True)
class Needle(base.Task):
    """One needle, one question.

    Attributes:
        keys: Needles' keys; at least ``queries``.
        values: Values of each key.
        queries: Keys asked.
        haystack: ``"text"``, ``"noise"`` (a few sentences over and over) or ``"needles"``.
        value: ``"numbers"`` or ``"uuids"``.
        digits: Digits of a number; None for 7 as in RULER, and 5 where nothing is instructed,
            which is what the packaged model knows.
        depths: Size of the grid of depths.
        file: Text to hide in; Python's documentation by default.
    """

    name: ClassVar[str] = "needle"
    forms: ClassVar[tuple[str, ...]] = (base.INSTRUCT, base.CONTINUE, base.KEY_VALUE)
    axis: ClassVar[str | None] = "depth"

    keys: int = 1
    values: int = 1
    queries: int = 1
    haystack: str = haystack.TEXT
    value: str = "numbers"
    digits: int | None = None
    depths: int = 10
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {"keys": self.keys, "values": self.values, "queries": self.queries}
        check_positive(self.name, **counts, depths=self.depths, digits=self.digits or DIGITS)
        haystack.check_kind(
            self.name, self.haystack, (haystack.TEXT, haystack.NOISE, haystack.NEEDLES)
        )
        if self.value not in _VALUES or self.queries > self.keys:
            raise ConfigError(
                problem(
                    self.name,
                    expected=f"value among {', '.join(_VALUES)} and queries <= keys",
                    got=f"value={self.value!r}, queries={self.queries}, keys={self.keys}",
                    fix="Change one of them.",
                )
            )

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        used: set[str] = set()
        keys = [haystack.new_word(rng, used) for _ in range(self.keys)]
        values = [[self._draw(rng, form) for _ in range(self.values)] for _ in keys]
        pairs = [(k, v) for k, several in zip(keys, values, strict=True) for v in several]
        # The first value of the first key lies where the grid says, the others anywhere.
        others = max(_OTHER_DEPTHS, len(pairs))
        drawn = rng.sample(range(others), len(pairs) - 1)
        depths = [haystack.grid(self.depths, index), *(n / (others - 1) for n in drawn)]
        places = dict(zip(pairs, depths, strict=True))

        before, questions = self._questions(codec, form, keys, values, places)
        needles = [codec.encode(self._sentence(form, *pair)) for pair in pairs]
        room = length - len(before) - max(len(q.ids) + q.limit for q in questions)
        room -= sum(map(len, needles))
        if room < 1:
            raise base.too_short(self, length, length - room + 1)
        if self.haystack == haystack.NEEDLES:

            def other() -> str:
                word = haystack.new_word(rng, used)
                return self._sentence(form, word, self._draw(rng, form))

            hay = haystack.fill(codec, other, room)
            at = [round(depth * len(hay)) for depth in depths]
            whole = secrets.insert(hay, [[needle] for needle in needles], at)
            document = [token for ids in whole for token in ids]
        else:
            hidden_in = haystack.filler(codec, self.haystack, self.file, room, rng)
            document = haystack.plant(codec, hidden_in, needles, depths)
        return base.Sample(
            document=(*before, *document),
            questions=questions,
            meta={"form": form, "depth": depths[0]},
        )

    def _questions(
        self,
        codec: Codec,
        form: str,
        keys: list[str],
        values: list[list[str]],
        places: dict[tuple[str, str], float],
    ) -> tuple[list[int], tuple[base.Question, ...]]:
        """What comes before the document, and the questions."""

        def at(key: str, value: str) -> float:
            return haystack.nearest(self.depths, places[key, value])

        kind, asked = _VALUES[self.value], keys[: self.queries]
        if form == base.INSTRUCT:
            whose = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
            one = self.queries * self.values == 1
            noun, verb = (kind, "is") if one else (f"{kind}s", "are")
            before, after = codec.frame(
                f"The text below mentions secret {kind}s. Remember them; "
                "questions about them follow.\n\n",
                f"\n\nQuestion: Which secret {noun} of {whose} does the text mention?",
                f" The secret {noun} of {whose} {verb}",
            )
            wanted = [(key, v) for key, found in zip(asked, values, strict=False) for v in found]
            question = base.Question(
                ids=tuple(after),
                answers=tuple(value for _, value in wanted),
                limit=_LIMIT,
                at=tuple(at(*pair) for pair in wanted),
            )
            return before, (question,)
        questions = []
        for key, found in zip(asked, values, strict=False):
            for value in found:
                others = "".join(self._sentence(form, key, v) for v in found if v != value)
                begun = self._sentence(form, key, "").rstrip(".\n")
                ids, limit = codec.split(others + begun, value)
                questions.append(
                    base.Question(
                        ids=tuple(ids), answers=(value,), limit=limit, at=(at(key, value),)
                    )
                )
        return codec.begin(), tuple(questions)

    def _sentence(self, form: str, key: str, value: str) -> str:
        if form == base.KEY_VALUE:
            return f"\n{key} -> {value}\n"
        return f" The secret {_VALUES[self.value]} of {key} is {value}."

    def _draw(self, rng: Random, form: str) -> str:
        if self.value == "uuids":
            return str(UUID(int=rng.getrandbits(128), version=4))
        return haystack.digits(rng, self.digits or (7 if form == base.INSTRUCT else DIGITS))


@dataclass(frozen=True, kw_only=True)
class MultiKey(Needle):
    """Four needles, one of them asked."""

    name: ClassVar[str] = "needle_multikey"

    keys: int = 4


@dataclass(frozen=True, kw_only=True)
class MultiValue(Needle):
    """One key with four values, all asked."""

    name: ClassVar[str] = "needle_multivalue"

    values: int = 4


@dataclass(frozen=True, kw_only=True)
class MultiQuery(Needle):
    """Four needles, all asked."""

    name: ClassVar[str] = "needle_multiquery"

    keys: int = 4
    queries: int = 4
