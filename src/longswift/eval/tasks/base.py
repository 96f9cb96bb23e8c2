"""The shape of every task: a frozen dataclass that writes samples and scores answers.

A sample is one document and the questions about it, as token ids, so that a model reads the
document once and answers all of them. Token ids are joined, never tokenised again, which keeps
lengths exact.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from longswift.core.errors import ConfigError, InputError, check_positive, problem
from longswift.eval.models import Codec

AUTO, INSTRUCT, CONTINUE, KEY_VALUE = "auto", "instruct", "continuation", "key_value"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What follows the document.

    Attributes:
        ids: Token ids.
        answers: Everything a full answer names; alternatives where the task says so.
        limit: Tokens the model may write.
        at: For each answer where it stands on the task's axis, e.g. its depth; empty if the task
            has no axis.
    """

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    limit: int
    at: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document and what is asked about it.

    Attributes:
        document: Token ids, those that begin a text or a chat included.
        questions: Asked one at a time behind the document, which is read once.
        meta: Whatever tells how the sample was made.
    """

    document: tuple[int, ...]
    questions: tuple[Question, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Longest sequence the model sees: document, a question and the room for its answer."""
        return len(self.document) + max((len(q.ids) + q.limit for q in self.questions), default=0)

    def prompt(self, question: int = 0) -> tuple[int, ...]:
        """Token ids of the document and one question, as a model reads them in one go."""
        return self.document + self.questions[question].ids


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model gave for a sample.

    Attributes:
        texts: One answer per question.
        losses: Negative log-likelihood of each token after the first, where a task asks for it.
    """

    texts: tuple[str, ...] = ()
    losses: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of one sample.

    Attributes:
        metric: Which of the task's metrics.
        value: The figure.
        weight: What it counts in a mean; the weights of a question's answers sum to one.
        at: Place on the task's axis, or None.
    """

    metric: str
    value: float
    weight: float = 1.0
    at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A kind of question; the instance is its configuration.

    Subclasses set the class attributes and implement ``_generate`` and ``score``. A sample depends
    on nothing but the configuration, the tokenizer, the length and the index.

    Attributes:
        form: ``"instruct"`` asks in words (in the chat template if the tokenizer has one),
            ``"continuation"`` needs only a model that goes on with a text, ``"key_value"`` (where
            a task has it) shows bare ``key -> value`` lines. ``"auto"`` is ``"instruct"`` for
            tokenizers with a chat template and ``"continuation"`` for the others.
        seed: Seed of everything random.
    """

    name: ClassVar[str]
    forms: ClassVar[tuple[str, ...]] = (INSTRUCT, CONTINUE)
    metrics: ClassVar[tuple[str, ...]] = ("score",)
    axis: ClassVar[str | None] = None
    likelihood: ClassVar[bool] = False

    form: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in (AUTO, *self.forms):
            raise ConfigError(
                problem(
                    f"{self.name}.form",
                    expected=f"one of {', '.join((AUTO, *self.forms))}",
                    got=repr(self.form),
                    fix="Pick one.",
                )
            )

    def generate(self, codec: Codec, length: int, index: int) -> Sample:
        """Sample number ``index`` of at most ``length`` tokens, question and answer included.

        Raises:
            DoesNotFit: The sample needs more than ``length`` tokens.
            InputError: The task's file is missing, malformed or too short.
        """
        check_positive(self.name, length=length)
        sample = self._generate(codec, length, index)
        if sample.tokens > length:
            raise too_short(self, length, sample.tokens)
        return sample

    @abstractmethod
    def _generate(self, codec: Codec, length: int, index: int) -> Sample:
        """Make the sample; ``generate`` checks its length."""

    def score(self, sample: Sample, output: Output) -> list[Score]:
        """Figures of one sample.

        Unless a task says otherwise: the share of each question's answers that the text names, and
        where nothing is instructed, whether the text is the answer and nothing else.
        """
        instructed = sample.meta["form"] == INSTRUCT
        return named(sample, output) if instructed else continued(sample, output)

    def available(self, codec: Codec, length: int, wanted: int) -> int:
        """How many of ``wanted`` samples of this length exist; endless unless a task says so."""
        return wanted

    def to_dict(self) -> dict[str, Any]:
        """Name and every field, ready for JSON."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def form_for(self, codec: Codec) -> str:
        """The form used with this tokenizer."""
        if self.form != AUTO:
            return self.form
        return INSTRUCT if codec.has_chat else CONTINUE

    def random(self, length: int, index: int) -> random.Random:
        """The random numbers of one sample; the same in every process."""
        return random.Random(f"{self.seed}/{self.name}/{length}/{index}")


class DoesNotFit(InputError):
    """A sample is longer than the length asked for; nothing is ever cut off."""


def too_short(task: Task, length: int, needed: int | None = None) -> DoesNotFit:
    """The error for a length into which a sample does not fit."""
    sample = "a sample" if needed is None else f"a sample of {needed}"
    return DoesNotFit(
        problem(
            task.name,
            expected=f"room for {sample}",
            got=f"a length of {length:,} tokens",
            fix="Raise the length; samples are never truncated.",
        )
    )


def named(sample: Sample, output: Output) -> list[Score]:
    """Share of each question's answers that the text contains, upper and lower case alike."""
    scores = []
    for question, said in zip(sample.questions, output.texts, strict=True):
        weight = 1 / len(question.answers)
        for i, answer in enumerate(question.answers):
            found = float(answer.lower() in said.lower())
            at = question.at[i] if question.at else None
            scores.append(Score(metric="score", value=found, weight=weight, at=at))
    return scores


def continued(sample: Sample, output: Output) -> list[Score]:
    """Whether each text is the (single) answer and nothing else."""
    return [
        Score(
            metric="score",
            value=float(said.strip() == question.answers[0]),
            at=question.at[0] if question.at else None,
        )
        for question, said in zip(sample.questions, output.texts, strict=True)
    ]
