"""Scores of many samples: means with their uncertainty per task, length, place and mechanism."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from longswift.eval.tasks import TASKS

_Z = 1.959964
NLL = "nll"


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One task at one length (and place) with one mechanism.

    Attributes:
        task: Name of the task.
        length: Tokens of a sample, question and answer included.
        mechanism: Name of the mechanism.
        metric: One of the task's metrics.
        at: Place on the task's axis (depth, position, hops), or None for all places together.
        score: Weighted mean; None if every sample was refused.
        low: Lower end of the 95 % Wilson interval; None for likelihoods, which are no shares.
        high: Upper end.
        count: Sum of the weights: questions, or tokens for likelihoods.
        samples: Documents read.
        refused: Documents that did not fit into the length.
    """

    task: str
    length: int
    mechanism: str
    metric: str
    at: float | None
    score: float | None
    low: float | None
    high: float | None
    count: float
    samples: int
    refused: int


def wilson(mean: float, count: float) -> tuple[float, float]:
    """95 % interval of a share seen in ``count`` trials (Wilson, 1927).

    For scores between 0 and 1 that are no mere yes or no it is too wide rather than too narrow, as
    nothing of the same mean varies more than yes and no.
    """
    if count <= 0:
        return 0.0, 1.0
    z2 = _Z * _Z / count
    middle = (mean + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count))
    # Rounding must not leave a share of 0 or 1 outside of its own interval.
    return max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))


def aggregate(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all entries, whatever their order; places after the row of all places."""
    cells: dict[tuple[str, int, str, str], dict[float | None, list[tuple[float, float]]]] = {}
    seen: dict[tuple[str, int, str], list[int]] = {}
    order = sorted(entries, key=lambda e: (e["task"], e["length"], e["mechanism"], e["index"]))
    for entry in order:
        case = entry["task"], entry["length"], entry["mechanism"]
        counts = seen.setdefault(case, [0, 0])
        counts["refused" in entry] += 1
        for metric in TASKS.get(entry["task"]).metrics:
            cells.setdefault((*case, metric), {None: []})
        for score in entry.get("scores", ()):
            case_metric = (*case, score["metric"])
            found = cells[case_metric]
            found[None].append((score["value"], score["weight"]))
            if score["at"] is not None:
                found.setdefault(score["at"], []).append((score["value"], score["weight"]))
    rows = []
    for (task, length, mechanism, metric), places in cells.items():
        samples, refused = seen[task, length, mechanism]
        for at in sorted(places, key=lambda at: -1.0 if at is None else at):
            count = math.fsum(weight for _, weight in places[at])
            mean = low = high = None
            if count:
                mean = math.fsum(value * weight for value, weight in places[at]) / count
                if metric != NLL:
                    # Thirds and sevenths may sum to more than one.
                    mean = min(1.0, mean)
                    low, high = wilson(mean, count)
            rows.append(
                asdict(
                    ScoreRow(
                        task=task,
                        length=length,
                        mechanism=mechanism,
                        metric=metric,
                        at=at,
                        score=mean,
                        low=low,
                        high=high,
                        count=count,
                        samples=samples,
                        refused=refused,
                    )
                )
            )
    return rows
