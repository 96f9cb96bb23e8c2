"""Documents with secrets hidden in them, and the questions about them, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longswift.core.errors import InputError, problem
from longswift.eval.models import Loaded
from longswift.eval.reading import ask


@dataclass(frozen=True, kw_only=True)
class Exam:
    """One document and its questions.

    Attributes:
        document: Token ids.
        questions: Token ids to append to the document, one list per secret.
        answers: The digits that answer each question.
        lengths: Tokens of each answer.
        depths: Where each secret lies, 0 start, 1 end.
    """

    document: list[int]
    questions: list[list[int]]
    answers: tuple[str, ...]
    lengths: list[int]
    depths: tuple[float, ...]


def answer(loaded: Loaded, exam: Exam, cache: Any) -> list[str]:
    """What the model says to every question, the document being in ``cache``."""
    return [
        loaded.decode(ask(loaded.model, question, cache, length)).strip()
        for question, length in zip(exam.questions, exam.lengths, strict=True)
    ]


def exams(
    loaded: Loaded, text: str, *, length: int, documents: int, secrets: int, seed: int
) -> list[Exam]:
    """The same text, each time with other secrets; together they cover the depths evenly.

    Args:
        loaded: The model that will read them.
        text: What they are hidden in.
        length: Tokens of each document, secrets included.
        documents: How many.
        secrets: How many secrets each hides.
        seed: Chooses words and numbers.

    Raises:
        InputError: The text is too short, or the length too small for the secrets.
    """
    asked = documents * secrets
    places = [(i + 0.5) / asked for i in range(asked)]
    whole = loaded.encode(text)
    return [_exam(loaded, whole, length, seed + i, places[i::documents]) for i in range(documents)]


def _exam(loaded: Loaded, whole: list[int], length: int, seed: int, depths: list[float]) -> Exam:
    """Hide the secrets so that the whole document has exactly ``length`` tokens."""
    from longswift.tiny import tasks

    begin, secrets = loaded.begin(), len(depths)
    room = length - len(begin)

    def hide(document: list[int]) -> tasks.Hidden:
        return tasks.hide_secrets(document, secrets, seed=seed, depths=depths, encode=loaded.encode)

    hidden = hide([])
    room -= len(hidden.document)
    if room < len(hidden.document):
        raise InputError(
            problem(
                "--length",
                expected=f"at least {length - room + len(hidden.document)} tokens, so that "
                f"{secrets} secrets fit",
                got=length,
                fix="Raise --length or lower --secrets.",
            )
        )
    if len(whole) < room:
        raise InputError(
            problem(
                "document",
                expected=f"at least {room} tokens",
                got=f"{len(whole)}",
                fix=f"Use --length {len(whole)} or a longer --file.",
            )
        )
    hidden = hide(whole[:room])
    pairs = zip(hidden.questions, hidden.answers, strict=True)
    asked = [loaded.split(f"{question} ", answer) for question, answer in pairs]
    return Exam(
        document=[*begin, *hidden.document],
        questions=[ids for ids, _ in asked],
        answers=hidden.answers,
        lengths=[size for _, size in asked],
        depths=hidden.depths,
    )
