"""The report in words: what was gained, what was lost, and whether that is enough to tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from longswift.eval import guarded, standings, text
from longswift.eval import report_sections as measured
from longswift.eval.cost import remedy, scores_every_key
from longswift.eval.fidelity_runs import GOOD_AGREEMENT, GOOD_KL
from longswift.eval.report_sections import FULL, WINDOW, ReadingRow
from longswift.eval.results import Result
from longswift.eval.scores import NLL

GOOD, BAD, NOTE = "good", "bad", "note"
# Retrieval kept: what full attention finds is found, but for one question in a hundred.
KEPT = 0.99
# Mass below this leaves a head without a tenth of what it looks at.
CAPTURED = 0.9
# An interval wider than this tells little.
_UNSURE = 0.2
# Reading times differ by as much from run to run.
_SAME_TIME = 0.1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence of the verdict.

    Attributes:
        level: ``"good"``, ``"bad"`` or ``"note"``.
        text: The sentence.
    """

    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The report in words.

    Attributes:
        headline: Whether to use it, in a sentence or two.
        level: The worst level that matters to quality, or ``"note"`` if nothing tells. Bad, too,
            where the coverage guard had to replace most of the subject's work.
        findings: One sentence a matter, the most important first.
    """

    headline: str
    level: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}


def verdict(result: Result) -> Verdict:
    """What the sections say about the subject of the report."""
    rows = {row.name: row for row in measured.readings(result)}
    name = result.summary["subject"]
    subject, full = rows[name], rows[FULL]
    retrieval = _retrieval(result, name)
    ends = _ends(result)
    heads = _heads(result)
    words = _perplexity(subject, full, rows.get(WINDOW))
    quality = [f for f in (*retrieval, *ends, *heads, words) if f.level != NOTE]
    bad = [finding for finding in quality if finding.level == BAD]
    speed = _speed(subject, full)
    level = BAD if bad else GOOD if quality else NOTE
    # Probes and dense blocks of a guard are counted beside the keys that were chosen.
    exact = scores_every_key(name, subject.density) and not guarded.probed(subject.guard)
    if exact:
        level = NOTE
    headline = _headline(subject, full, level, bool(quality), exact)
    if guarded.mostly_dense(subject.guard):
        level = BAD
    findings = (
        *_guard(rows.values()),
        *retrieval,
        *ends,
        *heads,
        speed,
        _memory(subject, full),
        words,
    )
    order = {BAD: 0, GOOD: 1, NOTE: 2}
    kept = [finding for finding in findings if finding is not None]
    return Verdict(
        headline=headline,
        level=level,
        findings=tuple(sorted(kept, key=lambda finding: order[finding.level])),
    )


def _headline(subject: ReadingRow, full: ReadingRow, level: str, judged: bool, exact: bool) -> str:
    begin = f"{subject.label} reads these {subject.tokens:,} tokens {_pace(subject, full)}"
    if exact:
        return (
            f"{subject.label} scores {100 * subject.density:.0f} % of the keys here: at this "
            "length it is full attention, and nothing was learned about what it leaves out. "
            "Give a longer text."
        )
    if level != BAD and guarded.mostly_dense(subject.guard):
        return (
            f"{begin}, and its guard computed most blocks densely: what it keeps is full "
            "attention's work, not its own. Do not use this configuration for such texts: raise "
            "key_tokens or the windows, or lower min_coverage."
        )
    if not judged:
        return (
            f"{begin}, but nothing that tells its quality was measured: whether it keeps what full "
            "attention finds is open."
        )
    if level == BAD:
        return (
            f"{begin}, and loses what full attention keeps. Do not use this configuration for such "
            f"texts: {remedy(subject.name)}."
        )
    if full.seconds / subject.seconds <= 1 - _SAME_TIME:
        return (
            f"{begin}, so there is no reason to use it at this length, though it keeps what full "
            "attention finds."
        )
    return f"{begin} and keeps what full attention finds."


def _guard(rows: Iterable[ReadingRow]) -> list[Finding]:
    return [
        Finding(
            level=BAD if guarded.mostly_dense(row.guard) else NOTE,
            text=f"Guard of {row.label}: {guarded.sentence(row.guard, row.density)}",
        )
        for row in rows
        if row.guard is not None
    ]


def _pace(subject: ReadingRow, full: ReadingRow) -> str:
    ratio = full.seconds / subject.seconds
    if 1 - _SAME_TIME < ratio < 1 + _SAME_TIME:
        return "about as fast as full attention"
    return f"{text.times_faster(ratio)} than full attention"


def _retrieval(result: Result, name: str) -> list[Finding]:
    suite = measured.retrieval(result)
    if suite is None:
        return []
    if name in suite.summary.get("refused", {}):
        return [Finding(level=BAD, text=f"Retrieval did not run: {suite.summary['refused'][name]}")]
    asked = [r for r in standings.rows(suite) if r.metric != NLL and r.at is None]
    if not asked:
        # Predicting the next token retrieves nothing; the reading says what it costs.
        return []
    if all(row.score is None for row in asked):
        return [
            Finding(
                level=NOTE,
                text="Retrieval tells nothing: no document fits into the lengths asked. "
                "Give a longer text.",
            )
        ]
    labels = measured.labels(result)
    found = [case for case in standings.compared(suite) if case[0].mechanism == name]
    if not found:
        return [
            Finding(
                level=NOTE,
                text="Retrieval tells nothing: full attention itself gets less than half right in "
                "every task asked. Try easier tasks, shorter lengths or another model.",
            )
        ]
    dense = standings.dense(suite).get(name, [])
    found = [case for case in found if case[0].length not in dense]
    if not found:
        return [
            Finding(
                level=NOTE,
                text="Retrieval tells nothing: at the lengths asked every key was scored. "
                "Give a longer text.",
            )
        ]
    # Of equally good cases the longest tells most.
    row, full, kept = min(found, key=lambda case: (case[2], -case[0].length))
    said = (
        f"Retrieval: {_count(row.score, row.count)} right in {row.task} at {row.length:,} tokens, "
        f"where full attention gets {_count(full.score, full.count)}"
    )
    window = next(
        (r for r in standings.rows(suite) if _same_case(r, row) and r.mechanism == WINDOW), None
    )
    if window is not None and name != WINDOW:
        equal = str(row.length) in suite.summary["windows"]
        other = "window of equal cost" if equal else labels[WINDOW]
        said += f" and a {other} {_count(window.score, window.count)}"
    if len(found) > 1:
        said += f"; in the other {len(found) - 1} comparisons no less is kept"
    if kept < KEPT:
        said += f". That is {100 * kept:.0f} % of full attention's score"
        return [Finding(level=BAD, text=f"{said}.")]
    if row.low is not None and row.low < (full.score or 1.0) - _UNSURE:
        said += f". So few questions would also fit {100 * row.low:.0f} %: ask more (--samples)"
    return [Finding(level=GOOD, text=f"{said}.")]


def _same_case(row: Any, other: Any) -> bool:
    case = (row.task, row.metric, row.length, row.at)
    return bool(case == (other.task, other.metric, other.length, other.at))


def _count(score: float | None, count: float) -> str:
    return "nothing" if score is None else f"{100 * score:.0f} % of {count:,.0f}"


def _ends(result: Result) -> list[Finding]:
    content = measured.section(result, measured.FIDELITY)
    if content is None:
        return []
    own = content["ends"][content["measured"]]
    if own["kl"] is None:
        return []
    window = content["ends"].get("window")
    fine = own["kl"] <= GOOD_KL and own["agreement"] >= GOOD_AGREEMENT
    than = "" if window is None else f" (a window of equal cost: {window['kl']:.4f})"
    said = (
        f"Next token: the distribution differs from full attention's by {own['kl']:.4f} nats"
        f"{than}; the likeliest token is the same at {100 * own['agreement']:.1f} % of positions."
    )
    if not fine:
        said += f" Close would be at most {GOOD_KL} nats and at least {100 * GOOD_AGREEMENT:.0f} %."
    return [Finding(level=GOOD if fine else BAD, text=said)]


def _heads(result: Result) -> list[Finding]:
    content = measured.section(result, measured.FIDELITY)
    if content is None:
        return []
    heads = [
        head
        for head in content["heads"]
        if head["name"] == content["measured"] and head["captured_mean"] is not None
    ]
    if not heads:
        return []
    worst = min(heads, key=lambda head: head["captured_mean"])
    mean = sum(head["captured_mean"] for head in heads) / len(heads)
    low = [head for head in heads if head["captured_mean"] < CAPTURED]
    said = (
        f"Attention: {100 * mean:.0f} % of full attention's mass lies on keys seen exactly; the "
        f"worst head (layer {worst['layer']}, head {worst['head']}) has "
        f"{100 * worst['captured_mean']:.0f} %"
    )
    if low:
        said += f", and {len(low)} of {len(heads)} heads have less than {100 * CAPTURED:.0f} %"
    if content["ends"][content["measured"]]["kl"] is not None:
        # What is missing may be seen through means; the model's end tells what it was worth.
        return [Finding(level=NOTE, text=f"{said}.")]
    return [Finding(level=BAD if mean < CAPTURED else GOOD, text=f"{said}.")]


def _speed(subject: ReadingRow, full: ReadingRow) -> Finding:
    ratio = full.seconds / subject.seconds
    level = GOOD if ratio > 1 + _SAME_TIME else NOTE if ratio > 1 - _SAME_TIME else BAD
    return Finding(
        level=level,
        text=f"Speed: {text.seconds(subject.seconds)} to read, full attention "
        f"{text.seconds(full.seconds)} ({text.times_faster(ratio)}), the whole model measured, "
        f"while scoring {100 * subject.density:.1f} % of the keys.",
    )


def _memory(subject: ReadingRow, full: ReadingRow) -> Finding | None:
    if subject.peak_bytes is None or full.peak_bytes is None:
        return None
    return Finding(
        level=NOTE,
        text=f"Memory: {text.megabytes(subject.peak_bytes)} above the loaded model, full attention "
        f"{text.megabytes(full.peak_bytes)}.",
    )


def _perplexity(subject: ReadingRow, full: ReadingRow, window: ReadingRow | None) -> Finding:
    ratio = measured.perplexity(subject.nll - full.nll)
    said = f"Perplexity: {measured.perplexity(subject.nll):.3f}, {ratio:.3f} times full attention's"
    if window is not None and window is not subject:
        said += f" (window: {measured.perplexity(window.nll - full.nll):.3f} times)"
    return Finding(
        level=BAD if ratio > 1.05 else NOTE,
        text=f"{said}. It proves little: most tokens need only their neighbours.",
    )
