"""How time, memory and state grow with the length: exponents, and over which lengths they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longswift.eval.timing import fit_exponent

if TYPE_CHECKING:
    from longswift.eval.attention_table import AttentionRow


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Exponents of one rival: 0 does not grow, 1 is linear, 2 quadratic; None cannot be fitted.

    Attributes:
        name: Its row.
        shortest: First length of the fit.
        longest: Last one.
        time: Exponent of the median time.
        last_time: The same between the two longest lengths alone, where overhead hides least.
        memory: Exponent of q, k, v, output and working memory together.
        state: Exponent of what decoding carries.
    """

    name: str
    shortest: int
    longest: int
    time: float | None
    last_time: float | None
    memory: float | None
    state: float | None


def fitted(rows: Sequence[AttentionRow]) -> Sequence[AttentionRow]:
    """Rows whose growth tells: below its crossover a mechanism is dense and grows as that does."""
    sparse = [row for row in rows if row.density < 1]
    return sparse if len(sparse) > 1 else rows


def growth(rivals: Mapping[str, Sequence[AttentionRow]]) -> dict[str, Growth]:
    """Every rival with at least two lengths.

    Args:
        rivals: Rows by name, ascending in length.
    """
    found = {}
    for name, every in rivals.items():
        rows = fitted(every)
        if len(rows) < 2:
            continue
        found[name] = Growth(
            name=name,
            shortest=rows[0].length,
            longest=rows[-1].length,
            time=_exponent(rows, lambda row: row.seconds),
            last_time=_exponent(rows[-2:], lambda row: row.seconds),
            memory=_exponent(rows, lambda row: row.footprint),
            state=_exponent(rows, lambda row: row.state_bytes),
        )
    return found


def _exponent(
    rows: Sequence[AttentionRow], value: Callable[[AttentionRow], float | None]
) -> float | None:
    known = [(row.length, number) for row in rows if (number := value(row))]
    return fit_exponent([n for n, _ in known], [number for _, number in known])
