"""The frame of a benchmark: case after case, continued where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longswift.eval import baselines, options
from longswift.eval.progress import Bar, Share, bar
from longswift.eval.results import Progress, Result, writable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Bench(Protocol):
    """What a benchmark of mechanisms against full attention is told."""

    @property
    def against(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def to_dict(self) -> dict[str, Any]: ...


def begin(kind: str, bench: Bench, output: str | Path | None, *, backward: bool) -> Result:
    """An empty result, once it is known that it can be written and the baseline can run.

    Args:
        kind: Kind of the result.
        bench: What to measure.
        output: JSON file to write, or None.
        backward: Whether gradients are timed.
    """
    if output is not None:
        writable(output, kind=kind)
    dtype = options.dtype(bench.dtype)
    baselines.check(bench.against, dtype=dtype, device=bench.device, backward=backward)
    return Result(kind=kind, config=bench.to_dict(), seed=bench.seed, rows=[])


def measure(
    result: Result,
    cases: Sequence[dict[str, Any]],
    rows_of: Callable[[dict[str, Any], Bar], Iterable[DataclassInstance]],
    *,
    record: type[DataclassInstance],
    share: int,
    summarise: Callable[[], dict[str, Any]],
    output: str | Path | None,
    fresh: bool,
    progress: bool,
) -> Result:
    """Measure what an earlier run of the same options in the same environment did not.

    Args:
        result: Where rows go.
        cases: Fields of a row, by which the rows of each case are known.
        rows_of: The rows of a case; tells a bar of its steps.
        record: What the rows are.
        share: Most steps of a case.
        summarise: The summary, once all rows are there.
        output: JSON file to write; finished cases are kept beside it until it is complete.
        fresh: Start over.
        progress: Show a bar on stderr.
    """
    kept = Progress(result, output, fresh=fresh, records=record)
    with bar(len(cases) * share, "starting", shown=progress, timed=True) as whole:
        for case in cases:
            step = Share(whole, share)
            if kept.find(**case) is None:
                kept.add(*(asdict(row) for row in rows_of(case, step)))
            step.finish()
    result.summary.update(summarise())
    if output is not None:
        result.save(output)
        kept.done()
    return result
