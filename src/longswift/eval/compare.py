"""Two results of the same benchmark: ratios, and whether the newer one got worse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

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
# Columns in which 0 is a figure like any other.
_FROM_ZERO = {"extra_bytes", "peak_bytes", "found"}
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


def _figures(result: Result, file: str | Path) -> dict[tuple[str, str], float]:
    """What a result holds by case and column; null, which is not measured, is not held."""
    found: dict[tuple[str, str], float] = {}
    for number, row in enumerate(result.rows):
        for measure in MEASURES:
            value: Any = row.get(measure)
            if value is None and (measure not in row or _may_lack(result, measure)):
                continue
            if not _is_figure(value, measure):
                least = "of at least 0" if measure in _FROM_ZERO else "above 0"
                raise InputError(
                    problem(
                        str(file),
                        expected=f"a finite number {least} as {measure!r} in rows[{number}] "
                        f"({_case(row)})",
                        got=repr(value),
                        fix="Measure again.",
                    )
                )
            found[_case(row), measure] = float(value)
    return found


def _may_lack(result: Result, measure: str) -> bool:
    """Whether null says that something was not measured, and is no damage."""
    return measure.endswith("bytes") or result.kind == "compare"


def _is_figure(value: Any, measure: str) -> TypeGuard[float]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        return False
    return bool(value >= 0 if measure in _FROM_ZERO else value > 0)


def compare(
    before: Result,
    after: Result,
    threshold: float = 0.1,
    *,
    files: tuple[str | Path, str | Path] = ("before", "after"),
) -> list[Change]:
    """Every figure that both results hold.

    Args:
        before: The older result.
        after: The newer one, of the same kind.
        threshold: Share by which a figure may get worse.
        files: What errors call the two.

    Raises:
        InputError: Different kinds, no case in common, or a figure that is none.
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
    known, changes = _figures(before, files[0]), []
    for (case, measure), new in _figures(after, files[1]).items():
        old = known.get((case, measure))
        if old is None:
            continue
        small = measure.endswith("bytes") and abs(new - old) < _NOISE_BYTES
        ratio = new / old if old else (1.0 if not new else float("inf"))
        worse = ratio < 1 / (1 + threshold) if MEASURES[measure] else ratio > 1 + threshold
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


def alone(
    before: Result, after: Result, *, files: tuple[str | Path, str | Path] = ("before", "after")
) -> Iterator[str]:
    """The figures that only one of two results holds, a line each."""
    old, new = (_figures(r, file) for r, file in zip((before, after), files, strict=True))
    for mine, others, file in ((old, new, files[0]), (new, old, files[1])):
        for case, measure in mine:
            if (case, measure) not in others:
                yield f"{measure} of {case} is only in {file}"


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
