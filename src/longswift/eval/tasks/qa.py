"""Question answering over the user's documents: a ``.jsonl`` file of documents and questions.

Each line is an object with ``document``, ``question`` and ``answer`` (a text or a list of accepted
texts). As in RULER's ``qa`` tasks, other documents of the file surround the one that is asked, up
to the length. Differences from RULER: the user's file instead of SQuAD and HotpotQA; the asked
document lies on a grid of depths; whole documents only; scored by token F1 and exact match after
SQuAD's normalisation instead of containment. A document that does not fit is refused and counted,
never cut.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from longswift.core.errors import ConfigError, InputError, check_positive, problem
from longswift.eval.documents import read_text
from longswift.eval.models import Codec
from longswift.eval.tasks import base, haystack

_FIELDS = ("document", "question", "answer")
_SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One line of the file."""

    document: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QA(base.Task):
    """Questions about long documents.

    Attributes:
        file: The ``.jsonl`` file.
        others: Surround the document by others of the file, up to the length.
        limit: Tokens of an answer.
        depths: Size of the grid of depths.
    """

    name: ClassVar[str] = "qa"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact")
    axis: ClassVar[str | None] = "depth"

    file: str | None = None
    others: bool = True
    limit: int = 32
    depths: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, limit=self.limit, depths=self.depths)
        if self.file is None:
            raise ConfigError(
                problem(
                    f"{self.name}.file",
                    expected="a .jsonl file of documents, questions and answers",
                    got="none",
                    fix="Give one with --questions questions.jsonl.",
                )
            )

    def available(self, codec: Codec, length: int, wanted: int) -> int:
        """At most one sample a line."""
        return min(wanted, len(read(str(self.file))))

    def _generate(self, codec: Codec, length: int, index: int) -> base.Sample:
        lines, form = read(str(self.file)), self.form_for(codec)
        if not 0 <= index < len(lines):
            raise InputError(
                problem(
                    f"{self.name} sample",
                    expected=f"a number from 0 to {len(lines) - 1}",
                    got=index,
                    fix="Ask for fewer samples, or give a longer file.",
                )
            )
        rng, asked = self.random(length, index), lines[index]
        if form == base.INSTRUCT:
            before, after = codec.frame(
                "Read the documents below; a question about them follows.\n\n",
                f"\n\nQuestion: {asked.question}\nAnswer with as few words as possible.",
                " Answer:",
            )
        else:
            before = codec.begin()
            after = codec.encode(f"\n\nQuestion: {asked.question}\nAnswer:")
        separator = codec.encode(_SEPARATOR)
        own = codec.encode(asked.document.strip())
        room = length - len(before) - len(after) - self.limit - len(own)
        if room < 0:
            raise base.too_short(self, length, length - room)
        around: list[list[int]] = []
        # The same document may have several questions.
        others = list({x.document for x in lines if x.document != asked.document})
        for text in rng.sample(sorted(others), len(others)) if self.others else ():
            ids = codec.encode(text.strip()) + separator
            if len(ids) <= room:
                around.append(ids)
                room -= len(ids)
        depth = haystack.grid(self.depths, index)
        place = round(depth * len(around))
        document = [token for ids in around[:place] for token in ids] + own
        document += [
            token for ids in around[place:] for token in separator + ids[: -len(separator)]
        ]
        question = base.Question(
            ids=tuple(after),
            answers=asked.answers,
            limit=self.limit,
            # Alone, a document lies nowhere in particular.
            at=(haystack.nearest(self.depths, place / len(around)),) if around else (),
        )
        return base.Sample(
            document=(*before, *document), questions=(question,), meta={"form": form}
        )

    def score(self, sample: base.Sample, output: base.Output) -> list[base.Score]:
        """Best token F1 and exact match over the accepted answers."""
        scores = []
        for question, text in zip(sample.questions, output.texts, strict=True):
            said = text.strip().partition("\n")[0]
            at = question.at[0] if question.at else None
            best = max(f1(said, answer) for answer in question.answers)
            exact = max(normal(said) == normal(answer) for answer in question.answers)
            scores.append(base.Score(metric="f1", value=best, at=at))
            scores.append(base.Score(metric="exact", value=float(exact), at=at))
        return scores


def normal(text: str) -> list[str]:
    """Words of an answer, lower case, without punctuation and articles (as SQuAD compares them)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(said: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of words."""
    ours, theirs = normal(said), normal(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def read(file: str) -> Sequence[Asked]:
    """The lines of a file.

    Raises:
        InputError: The first line that is malformed, by its number.
    """
    return _parse(read_text(file), file)


@lru_cache(maxsize=2)
def _parse(text: str, file: str) -> tuple[Asked, ...]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(_line(line, f"{file}, line {number}"))
    return tuple(found)


def _line(line: str, where: str) -> Asked:
    def refuse(got: str) -> InputError:
        return InputError(
            problem(
                where,
                expected='{"document": "...", "question": "...", "answer": "..." or [...]}',
                got=got,
                fix="Mend that line.",
            )
        )

    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise refuse(f"no JSON ({error})") from None
    if not isinstance(content, dict):
        raise refuse(f"a {type(content).__name__}")
    missing = [name for name in _FIELDS if name not in content]
    if missing:
        raise refuse(f"no {', '.join(missing)}")
    answers = content["answer"]
    answers = answers if isinstance(answers, list) else [answers]
    texts = [content["document"], content["question"], *answers]
    if not answers or not all(isinstance(x, str) and x.strip() for x in texts):
        raise refuse("a field that is empty or no text")
    return Asked(document=content["document"], question=content["question"], answers=tuple(answers))
