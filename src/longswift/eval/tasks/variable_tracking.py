"""Variable tracking: a chain of assignments is followed to all variables of one value.

RULER's ``vt`` with its numbers: one chain of 4 hops (5 variables of 5 capital letters), a number of
5 digits, assignments in order at random places of a text of noise. Differences from RULER: other
sentences and noise, assignments at the ends of sentences;
no worked example before the task (RULER shows one to models without a chat template). Each variable
counts at its number of hops from the value. Where nothing is instructed, each variable's value is
asked on its own, which a model must resolve through the chain.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

from longswift.core.errors import check_positive
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack

_LIMIT = 30


@dataclass(frozen=True, kw_only=True)
class VariableTracking(base.Task):
    """Chains of assignments, one of them asked.

    Attributes:
        chains: Chains of their own value; the first is asked.
        hops: Assignments from variable to variable in a chain.
        haystack: ``"noise"`` or ``"text"``.
        file: Text to hide in; Python's documentation by default.
    """

    name: ClassVar[str] = "variable_tracking"
    axis: ClassVar[str | None] = "hops"

    chains: int = 1
    hops: int = 4
    haystack: str = haystack.NOISE
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, chains=self.chains, hops=self.hops)
        haystack.check_kind(self.name, self.haystack)

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        rng, form = self.random(length, index), self.form_for(codec)
        count = self.hops + 1
        names: list[str] = []
        while len(names) < count * self.chains:
            name = "".join(rng.choices(string.ascii_uppercase, k=5))
            if name not in names:
                names.append(name)
        numbers: list[str] = []
        while len(numbers) < self.chains:
            number = haystack.digits(rng, 5)
            if number not in numbers:
                numbers.append(number)
        pieces, depths = [], []
        for chain, number in enumerate(numbers):
            own = names[chain * count : (chain + 1) * count]
            pieces += [
                codec.encode(f" VAR {variable} = {value}.")
                for variable, value in zip(own, [number, *own], strict=False)
            ]
            depths += sorted(rng.random() for _ in own)

        before, questions = self._questions(codec, form, names[:count], numbers[0])
        room = length - len(before) - sum(map(len, pieces))
        room -= max(len(q.ids) + q.limit for q in questions)
        if room < 1:
            raise base.too_short(self, length, length - room + 1)
        hay = haystack.filler(codec, self.haystack, self.file, room, rng)
        document = haystack.plant(codec, hay, pieces, depths)
        return base.Sample(document=(*before, *document), questions=questions, meta={"form": form})

    def _questions(
        self, codec: Codec, form: str, variables: list[str], number: str
    ) -> tuple[list[int], tuple[base.Question, ...]]:
        """What comes before the document, and the questions."""
        if form == base.INSTRUCT:
            before, after = codec.frame(
                "The text below assigns numbers to variables, and variables to variables. Follow "
                "the assignments.\n\n",
                f"\n\nQuestion: Which variables have the value {number}, be it by way of others?",
                f" The {len(variables)} variables with the value {number} are",
            )
            hops = tuple(float(i) for i in range(len(variables)))
            limit = max(_LIMIT, 2 * len(codec.encode(", ".join(variables))))
            question = base.Question(
                ids=tuple(after), answers=tuple(variables), limit=limit, at=hops
            )
            return before, (question,)
        questions = []
        for hop, variable in enumerate(variables):
            ids, limit = codec.split(f" The number behind VAR {variable} is ", number)
            questions.append(
                base.Question(ids=tuple(ids), answers=(number,), limit=limit, at=(float(hop),))
            )
        return codec.begin(), tuple(questions)
