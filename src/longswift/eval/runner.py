"""Samples are measured: a model reads each document once and answers all its questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from longswift.core.errors import UnsupportedError, problem
from longswift.core.mechanism import Mechanism
from longswift.core.observe import observe
from longswift.eval import options, reading
from longswift.eval.cost import Scored, count_keys, equal_cost_window
from longswift.eval.guarded import Guarded
from longswift.eval.journal import Journal
from longswift.eval.models import Loaded
from longswift.eval.progress import Bar
from longswift.eval.tasks.base import DoesNotFit, Output, Sample, Task

MODEL, FULL, WINDOW, SWIFT = "model", "full", "sliding_window", "ms_swift"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sample to be measured with one mechanism."""

    length: int
    mechanism: dict[str, Any]
    task: Task
    index: int

    def key(self) -> dict[str, Any]:
        """What names it in a journal."""
        return {
            "mechanism": self.mechanism["name"],
            "task": self.task.name,
            "length": self.length,
            "index": self.index,
        }


def identity(key: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a case or of a finished sample, comparable."""
    return key["mechanism"], key["task"], key["length"], key["index"]


class Runner:
    """Measures cases one after another, changing the model's attention as they demand.

    Args:
        loaded: The model.
        kept: Finished samples; new ones are added.
        chunk: Tokens per forward pass.
        equal_cost: Give ``sliding_window`` the cost of the ``ms_swift`` measured before.
        step: Progress, in tokens.

    Attributes:
        windows: Window of equal cost by length.
        refused: Mechanisms that cannot run, and why.
    """

    def __init__(
        self, loaded: Loaded, kept: Journal, *, chunk: int, equal_cost: bool, step: Bar
    ) -> None:
        self.loaded, self.kept, self.chunk, self.equal_cost = loaded, kept, chunk, equal_cost
        self.windows: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.step = step
        self.done = {identity(entry) for entry in kept.entries}
        self.current: tuple[int, str] | None = None
        self.mechanism: Mechanism | None = None
        self.ready = False

    def measure(self, case: Case) -> None:
        """Measure one case, unless that was done before."""
        name = case.mechanism["name"]
        self.step(text=f"{case.length} tokens, {name}: {case.task.name} {case.index + 1}")
        if (case.length, name) != self.current:
            self.current = case.length, name
            self.mechanism, self.ready = self._mechanism(case), False
        if identity(case.key()) not in self.done and name not in self.refused:
            try:
                if not self.ready:
                    self._activate()
                    self.ready = True
                self.kept.add({**case.key(), **self._read(case)})
            except UnsupportedError as error:
                self.refused[name] = str(error)
        self.step(case.length)

    def _mechanism(self, case: Case) -> Mechanism | None:
        """The mechanism of a case, with the window of equal cost where that is asked for."""
        if case.mechanism["name"] == MODEL:
            return None
        mechanism = options.from_json(case.mechanism)
        if mechanism.name != WINDOW or not self.equal_cost:
            return mechanism
        measured = self.kept.find(mechanism=SWIFT, length=case.length)
        read = [entry for entry in measured if entry.get("queries")]
        if not read:
            return mechanism
        keys = sum(e["keys"] for e in read) / sum(e["queries"] for e in read)
        window = equal_cost_window(keys, round(sum(e["read"] for e in read) / len(read)))
        self.windows[str(case.length)] = window
        return options.from_json({**case.mechanism, "window": window})

    def _activate(self) -> None:
        if self.mechanism is not None and not self.mechanism.supports_causal:
            raise UnsupportedError(
                problem(
                    self.mechanism.name,
                    expected="a mechanism with a causal form",
                    got="one without",
                    fix="It cannot run in a language model that writes.",
                )
            )
        self.loaded.use(self.mechanism)

    def _read(self, case: Case) -> dict[str, Any]:
        """Read one document, answer its questions, score the answers."""
        try:
            sample = case.task.generate(self.loaded, case.length, case.index)
        except DoesNotFit as error:
            return {"refused": str(error)}
        seen, guarded = Scored(), Guarded(case.index)
        told, output = answer(
            self.loaded,
            sample,
            chunk=self.chunk,
            likelihood=case.task.likelihood,
            watching=_watching(self.mechanism, seen, guarded),
        )
        return {
            "read": told.tokens,
            "seconds": told.seconds,
            "keys": seen.keys,
            "queries": seen.queries,
            "guard": [asdict(row) for row in guarded.rows()],
            "texts": list(output.texts),
            "scores": [asdict(score) for score in case.task.score(sample, output)],
            "meta": sample.meta,
        }


@contextmanager
def _watching(mechanism: Mechanism | None, seen: Scored, guarded: Guarded) -> Iterator[None]:
    """Counts the keys of the mechanism in force, and how often its guard fires."""
    with count_keys(mechanism, seen), observe(guarded.see):
        yield


def answer(
    loaded: Loaded,
    sample: Sample,
    *,
    chunk: int,
    likelihood: bool = False,
    watching: AbstractContextManager[None] | None = None,
) -> tuple[reading.Reading, Output]:
    """Let the model, as it attends now, read a document once and answer all its questions.

    Args:
        loaded: The model.
        sample: Document and questions.
        chunk: Tokens per forward pass.
        likelihood: Also give the loss of every token of the document.
        watching: Entered while the document is read, and left before questions are.
    """
    from longswift.hf import SwiftCache

    cache = SwiftCache(loaded.model.config)
    with watching or nullcontext():
        told = reading.read(loaded.model, sample.document, cache, chunk=chunk, score=likelihood)
    stop = loaded.stop_tokens()
    texts = [
        loaded.decode(reading.ask(loaded.model, q.ids, cache, q.limit, stop))
        for q in sample.questions
    ]
    return told, Output(texts=tuple(texts), losses=told.losses.tolist() if likelihood else ())
