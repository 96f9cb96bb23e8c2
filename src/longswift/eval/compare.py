"""Two results of the same benchmark: ratios, and whether the newer one got worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from longswift.core.errors import InputError, problem
from longswift.eval import text
from longswift.eval.results import Result

# Column, and whether more of it is better.
MEASURES = {
    "seconds": False,
    "extra_bytes": False,
    "prefill_seconds": False,
    "decode_tokens_per_second": True,
    "peak_bytes": False,
    "found": True,
    "perplexity": False,
}
# Memory below this is allocator noise, whatever the ratio.
_NOISE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure in both results.

    Attributes:
        case: What it belongs to.
        measure: Column of the rows.
        before: Figure of the first result.
        after: Figure of the second result.
        ratio: ``after / before``.
        worse: Beyond the threshold in the bad direction.
    """

    case: str
    measure: str
    before: float
    after: float
    ratio: float
    worse: bool


def _case(row: dict[str, object]) -> str:
    words = [str(row[key]) for key in ("part", "name", "length") if key in row]
    words += [f"batch {row['batch']}"] if "batch" in row else []
    return " ".join(words)


def compare(before: Result, after: Result, threshold: float = 0.1) -> list[Change]:
    """Every figure that both results hold.

    Args:
        before: The older result.
        after: The newer one, of the same kind.
        threshold: Share by which a figure may get worse.

    Raises:
        InputError: Different kinds, or no case in common.
    """
    if before.kind != after.kind:
        raise InputError(
            problem(
                "results",
                expected="two of one kind",
                got=f"{before.kind!r} and {after.kind!r}",
                fix="Compare results of the same benchmark.",
            )
        )
    rows = {_case(row): row for row in before.rows}
    changes = []
    for row in after.rows:
        case = _case(row)
        for measure, more_is_better in MEASURES.items():
            old, new = rows.get(case, {}).get(measure), row.get(measure)
            if old is None or new is None:
                continue
            small = measure.endswith("bytes") and abs(new - old) < _NOISE_BYTES
            ratio = new / old if old else (1.0 if not new else float("inf"))
            worse = ratio < 1 / (1 + threshold) if more_is_better else ratio > 1 + threshold
            changes.append(
                Change(
                    case=case,
                    measure=measure,
                    before=old,
                    after=new,
                    ratio=ratio,
                    worse=worse and not small,
                )
            )
    if not changes:
        raise InputError(
            problem(
                "results",
                expected="cases in common",
                got="none",
                fix="Measure the same lengths and mechanisms.",
            )
        )
    return changes


def differences(before: Result, after: Result) -> list[str]:
    """What makes a comparison of two results less than fair, a line each."""
    pairs = [(before.config, after.config, "options")]
    pairs.append((asdict(before.environment), asdict(after.environment), "environments"))
    found = []
    for old, new, what in pairs:
        names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if names:
            found.append(f"{what} differ in {', '.join(names)}")
    return found


def table(changes: Sequence[Change], tolerance: float) -> text.Table:
    """Ratios for people, the worse ones marked."""
    cells = [
        (
            change.case,
            change.measure,
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            f"{change.ratio:.2f}x",
            "worse" if change.worse else "",
        )
        for change in changes
    ]
    title = f"after / before, tolerance {tolerance:.0%}"
    return text.Table(title, ("", "figure", "before", "after", "ratio", ""), cells)
