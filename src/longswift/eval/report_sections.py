"""What a report holds: typed rows and sections, read back from its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

from longswift.eval.results import Result
from longswift.eval.rows import Records
from longswift.eval.runner import MODEL
from longswift.eval.scores import ScoreRow

FULL, WINDOW = "full", "sliding_window"
READING, RETRIEVAL, FIDELITY = "reading", "retrieval", "fidelity"


@dataclass(frozen=True, kw_only=True)
class ReadingRow:
    """The text read with one attention.

    Attributes:
        name: Mechanism.
        label: What to call it.
        tokens: Tokens read.
        seconds: Time of the decoder.
        tokens_per_second: Greedy decoding behind the text.
        peak_bytes: Memory above the loaded model, or None where it cannot be measured.
        keys_per_query: Keys scored per query in the layers replaced, mean.
        density: The same as a share of full attention's.
        nll: Mean negative log-likelihood of a token, nats.
        nll_by_part: The same for equal parts of the text.
        windows: ``[layer, KV head, window]`` where heads have windows.
        guard: What the coverage guard did (``guarded.summarise``); None without one.
    """

    name: str
    label: str
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    keys_per_query: float
    density: float
    nll: float
    nll_by_part: list[float]
    windows: list[tuple[int, int, int]]
    guard: dict[str, Any] | None = None


class _Cost(TypedDict):
    mechanism: str
    length: int
    samples: int
    seconds: float
    keys_per_query: float | None
    density: float | None
    guard: dict[str, Any] | None


class _Summary(TypedDict):
    windows: dict[str, Any]
    refused: dict[str, str]
    cost: list[_Cost]
    reused: int
    how: dict[str, Any]


class _Suite(TypedDict):
    kind: str
    config: dict[str, Any]
    seed: int
    rows: list[ScoreRow]
    summary: _Summary
    environment: dict[str, Any]
    date: str
    schema: int


class _End(TypedDict):
    keys_per_query: float
    density: float
    kl: float | None
    agreement: float | None
    perplexity: float
    perplexity_ratio: float | None


class _Head(TypedDict):
    name: str
    layer: int
    head: int
    density: float
    captured_mean: float | None
    captured_p10: float | None
    captured_min: float | None
    error: float


class _Judged(TypedDict):
    measured: str
    judge: str
    ends: dict[str, _End]
    heads: list[_Head]
    guard: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class _Reading(ReadingRow):
    section: str


class _Retrieval(TypedDict):
    section: str
    content: _Suite


class _Fidelity(TypedDict):
    section: str
    content: _Judged


# What the rows of a report are, by their section.
RECORDS: Records = (
    "section",
    {READING: _Reading, RETRIEVAL: _Retrieval, FIDELITY: _Fidelity},
)


def readings(result: Result) -> list[ReadingRow]:
    """The rows of the readings, typed, full attention first."""
    found = [row for row in result.rows if row["section"] == READING]
    rows = [ReadingRow(**{k: v for k, v in row.items() if k != "section"}) for row in found]
    return sorted(rows, key=lambda row: row.name != FULL)


def section(result: Result, name: str) -> dict[str, Any] | None:
    """The content of a section, or None if it was not measured."""
    found = next((row for row in result.rows if row["section"] == name), None)
    return None if found is None else found["content"]


def retrieval(result: Result) -> Result | None:
    """The suite's result, or None."""
    content = section(result, RETRIEVAL)
    if content is None:
        return None
    known = {"kind", "config", "seed", "rows", "summary"}
    return Result(
        **{key: value for key, value in content.items() if key in known},
        environment=result.environment,
        date=result.date,
    )


def perplexity(nll: float) -> float:
    """Per token; what overflows is infinite."""
    return math.exp(nll) if nll < 700 else math.inf


def labels(result: Result) -> dict[str, str]:
    """What each mechanism is called; the suite knows full attention as the model's own."""
    found = {row.name: row.label for row in readings(result)}
    return {**found, MODEL: found.get(FULL, "full attention")}
