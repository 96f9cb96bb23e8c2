"""Means and their uncertainty."""

from __future__ import annotations

import math
from typing import Any

import pytest

from longswift.eval import scores


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    # Newcombe, 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    mean: float, count: int, low: float, high: float
) -> None:
    assert scores.wilson(mean, count) == (
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )
    assert scores.wilson(1 - mean, count)[1] == pytest.approx(1 - low, abs=1e-4)


def test_nothing_asked_is_nothing_known() -> None:
    assert scores.wilson(0.5, 0) == (0.0, 1.0)
    assert scores.wilson(1.0, 10)[1] == 1.0


def entry(index: int, values: list[tuple[float, float, float | None]], **more: Any) -> Any:
    found = [
        {"metric": more.get("metric", "score"), "value": v, "weight": w, "at": at}
        for v, w, at in values
    ]
    task = more.get("task", "needle")
    return {"task": task, "length": 8, "mechanism": "full", "index": index, "scores": found}


def test_answers_count_by_their_weight_and_at_their_place() -> None:
    entries = [entry(0, [(1, 0.5, 0.0), (0, 0.5, 1.0)]), entry(1, [(1, 1, 0.0)])]
    whole, start, end = (scores.ScoreRow(**row) for row in scores.aggregate(entries))
    assert (whole.at, whole.score, whole.count, whole.samples) == (None, 0.75, 2, 2)
    assert (start.at, start.score, start.count) == (0.0, 1.0, 1.5)
    assert (end.at, end.score, end.count) == (1.0, 0.0, 0.5)
    assert whole.low is not None and whole.low < 0.75 < (whole.high or 0)
    assert scores.aggregate(entries[::-1]) == scores.aggregate(entries)


def test_likelihoods_are_weighted_by_tokens() -> None:
    values = [(1.0, 100.0, 0.25), (4.0, 50.0, 0.75)]
    rows = scores.aggregate([entry(0, values, task="perplexity", metric="nll")])
    assert rows[0]["score"] == pytest.approx(2.0) and rows[0]["low"] is None
    assert [row["at"] for row in rows] == [None, 0.25, 0.75]


def test_refused_samples_are_counted() -> None:
    refused = {"task": "needle", "length": 8, "mechanism": "full", "index": 1, "refused": "long"}
    (row, _) = scores.aggregate([entry(0, [(1, 1, 0.0)]), refused])
    assert (row["samples"], row["refused"], row["score"]) == (1, 1, 1.0)
    (only,) = scores.aggregate([refused])
    assert only["score"] is None and only["samples"] == 0
    assert math.isclose(scores.aggregate([entry(0, [(1, 1 / 3, 0.0)] * 3)])[0]["score"], 1)
