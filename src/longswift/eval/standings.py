"""Who keeps how much of full attention's scores: the suite's result in words and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

from longswift.eval import guarded, text
from longswift.eval.cost import scores_every_key
from longswift.eval.results import Result
from longswift.eval.runner import FULL, MODEL
from longswift.eval.scores import NLL, ScoreRow
from longswift.eval.tasks import TASKS

# A share of a score near zero is noise.
ABLE = 0.5


def share(row: ScoreRow, judge: ScoreRow | None) -> float | None:
    """A score as a share of full attention's; for likelihoods the ratio of the perplexities."""
    if judge is None or row.score is None or judge.score is None:
        return None
    if row.metric == NLL:
        return math.exp(row.score - judge.score)
    return row.score / judge.score if judge.score else None


def cell(row: ScoreRow | None, judge: ScoreRow | None) -> str:
    """A score for people, with its share of full attention's in brackets."""
    if row is None:
        return "-"
    if row.score is None:
        return "refused"
    of_full = None if row == judge else share(row, judge)
    if row.metric == NLL:
        shown = f"ppl {math.exp(row.score):.3f}"
        return shown if of_full is None else f"{shown} ({of_full:.3f}x)"
    shown = f"{100 * row.score:.0f} %"
    return shown if of_full is None else f"{shown} ({100 * of_full:.0f} %)"


def rows(result: Result) -> list[ScoreRow]:
    """The rows of a result, typed, in the order in which tasks were asked for."""
    order = [task["name"] for task in result.config["tasks"]]
    found = [ScoreRow(**row) for row in result.rows]
    return sorted(found, key=lambda row: order.index(row.task))


def main_metric(task: str) -> str:
    """The first of a task's metrics."""
    return TASKS.get(task).metrics[0]


def judge(result: Result) -> str | None:
    """The mechanism that the others are measured against: full attention, ours or the model's."""
    names = [entry["name"] for entry in result.config["mechanisms"]]
    return next((name for name in (FULL, MODEL) if name in names), None)


def compared(result: Result) -> Iterator[tuple[ScoreRow, ScoreRow, float]]:
    """Rows next to full attention's and the share kept, wherever that is half right or better."""
    full, found = judge(result), [row for row in rows(result) if row.at is None]
    by_case = {(r.task, r.metric, r.length, r.mechanism): r for r in found}
    for row in found:
        other = by_case.get((row.task, row.metric, row.length, str(full)))
        kept = share(row, other)
        able = other is not None and other.score is not None and other.score >= ABLE
        if row.mechanism != full and row.metric != NLL and able and kept is not None:
            assert other is not None
            yield row, other, kept


def dense(result: Result) -> dict[str, list[int]]:
    """Mechanisms other than full attention that scored every key, and at which lengths."""
    found: dict[str, list[int]] = {}
    for entry in result.summary["cost"]:
        every = scores_every_key(entry["mechanism"], entry["density"])
        if every and entry["mechanism"] != judge(result):
            found.setdefault(entry["mechanism"], []).append(entry["length"])
    return found


def guards(result: Result) -> list[str]:
    """How often each coverage guard fired while the documents were read, a sentence a length."""
    return [
        f"{entry['mechanism']} at {entry['length']:,} tokens: "
        f"{guarded.sentence(entry['guard'], entry['density'])}"
        for entry in result.summary["cost"]
        if entry.get("guard") is not None
    ]


def sentences(result: Result) -> list[str]:
    """What the rows say, in words; the worst task, because a mean hides it."""
    worst: dict[str, tuple[ScoreRow, ScoreRow, float]] = {}
    for found in compared(result):
        name = found[0].mechanism
        if name not in worst or found[2] < worst[name][2]:
            worst[name] = found
    said = [
        f"{name} keeps at least {100 * kept:.0f} % of full attention's score in every task and "
        f"length in which that is half right or better (least: {row.task} {row.metric} at "
        f"{row.length:,} tokens, {row.score:.2f} against {full.score:.2f})."
        for name, (row, full, kept) in worst.items()
    ]
    windows = result.summary.get("windows", {})
    if windows:
        sizes = ", ".join(f"{size:,} at {int(length):,} tokens" for length, size in windows.items())
        said.append(f"The window of equal cost is {sizes}.")
    said += [
        f"{name} is dense at {length:,} tokens: it saves nothing there, and its scores say nothing."
        for name, lengths in dense(result).items()
        for length in lengths
    ]
    said += guards(result)
    said += [
        f"{task} at {length:,} tokens: {refused} of {refused + samples} samples do not fit into "
        "this length and were refused, not cut; ask for a greater one."
        for task, length, samples, refused in dict.fromkeys(
            (row.task, row.length, row.samples, row.refused) for row in rows(result) if row.refused
        )
    ]
    said += [f"{name} did not run: {why}" for name, why in result.summary["refused"].items()]
    return said


def table(result: Result) -> text.Table:
    """The result for people: rows task x length, columns mechanisms."""
    names = [entry["name"] for entry in result.config["mechanisms"]]
    shown = [name for name in names if name not in result.summary["refused"]]
    found = [row for row in rows(result) if row.at is None]
    by_case = {(r.task, r.metric, r.length, r.mechanism): r for r in found}
    lines = []
    for task, metric, length in dict.fromkeys((r.task, r.metric, r.length) for r in found):
        scored = [by_case.get((task, metric, length, name)) for name in shown]
        full = by_case.get((task, metric, length, str(judge(result))))
        named = task if metric in ("score", NLL) else f"{task} ({metric})"
        counted = next(f"{row.count:,.0f}" for row in scored if row is not None)
        lines.append((named, text.tokens(length), counted, *(cell(row, full) for row in scored)))
    title = (
        f"{result.config['model']}: score (share of full attention's), "
        f"{result.environment.threads} thread(s)"
    )
    return text.Table(title, ("task", "tokens", "n", *shown), lines)
