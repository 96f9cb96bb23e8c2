"""Key-value retrieval: JSON lines of random keys and values, some of them asked at the end.

The task of Liu et al., 2023 (arXiv 2307.03172) and InfiniteBench's ``Retrieve.KV``: nothing but
look-alikes, so that only exact matching finds anything. RULER's nearest relative is
``niah_multikey_3``. Differences: one line a pair instead of one object, several pairs asked behind
one reading, on an even grid of depths; where nothing is instructed, keys are invented words and
values five digits instead of UUIDs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from uuid import UUID

from longswift.core.errors import check_positive
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack
from longswift.tiny.tasks import DIGITS

_LIMIT = 64


@dataclass(frozen=True, kw_only=True)
class KeyValue(base.Task):
    """As many random pairs as fit.

    Attributes:
        questions: Pairs asked per document, at successive depths of the grid.
        depths: Size of the grid of depths.
    """

    name: ClassVar[str] = "kv"
    forms: ClassVar[tuple[str, ...]] = (base.INSTRUCT, base.CONTINUE, base.KEY_VALUE)
    axis: ClassVar[str | None] = "depth"

    questions: int = 4
    depths: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, questions=self.questions, depths=self.depths)

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        used: set[str] = set()
        pairs: list[tuple[str, str]] = []

        def line() -> str:
            if form == base.INSTRUCT:
                key, value = (str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
            else:
                key, value = haystack.new_word(rng, used), haystack.digits(rng, DIGITS)
            pairs.append((key, value))
            return _line(form, key, value)

        lines = haystack.fill(codec, line, length)
        while len(lines) >= self.questions:
            before, questions = self._ask(codec, form, pairs[: len(lines)], index)
            room = length - len(before) - max(len(q.ids) + q.limit for q in questions)
            kept = sum(map(len, lines))
            if kept <= room:
                return base.Sample(
                    document=(*before, *(token for ids in lines for token in ids)),
                    questions=questions,
                    meta={"form": form, "pairs": len(lines)},
                )
            while kept > room and lines:
                kept -= len(lines.pop())
        raise base.too_short(self, length)

    def _ask(
        self, codec: Codec, form: str, pairs: list[tuple[str, str]], index: int
    ) -> tuple[list[int], tuple[base.Question, ...]]:
        """What comes before the document, and the questions."""
        before, questions = codec.begin(), []
        for i in range(self.questions):
            depth = haystack.grid(self.depths, index * self.questions + i)
            key, value = pairs[round(depth * (len(pairs) - 1))]
            if form == base.INSTRUCT:
                before, after = codec.frame(
                    "Each line below pairs a key with a value.\n\n",
                    f'\nQuestion: Which value does the key "{key}" have?',
                    f' The value of the key "{key}" is "',
                )
                limit = _LIMIT
            else:
                after, limit = codec.split(_line(form, key, value).partition(value)[0], value)
            questions.append(
                base.Question(ids=tuple(after), answers=(value,), limit=limit, at=(depth,))
            )
        return before, tuple(questions)


def _line(form: str, key: str, value: str) -> str:
    if form == base.KEY_VALUE:
        return f"{key} -> {value}\n"
    return f'{{"key": "{key}", "value": "{value}"}}\n'
