"""Fair timing: the rivals alternate in one process, and medians with their spread are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from longswift.core.errors import ConfigError, problem

# A first run of so many seconds is a sample.
_SLOW = 5.0


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall-clock time of one case.

    Attributes:
        median: Median over the samples.
        fastest: Smallest sample.
        slowest: Largest sample.
        samples: How many runs were timed.
    """

    median: float
    fastest: float
    slowest: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Seconds:
        """Summarise samples."""
        return cls(
            median=median(samples),
            fastest=min(samples),
            slowest=max(samples),
            samples=len(samples),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


def check_budget(seconds: float) -> None:
    """Raise ``ConfigError`` unless ``seconds`` is a positive number."""
    if not seconds > 0:
        raise ConfigError(
            problem("budget", expected="seconds above 0", got=seconds, fix="For example 60.")
        )


def alternate(
    rivals: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    compiles: bool = False,
    budget_seconds: float = 60.0,
    tick: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Time functions by turns, so that drift of the machine meets all of them alike.

    The first run of each warms up and is thrown away, unless it took seconds: there a
    cold start is negligible and another run is dear. Not so where the first run ``compiles``. A
    function stops early once its runs have spent ``budget_seconds``. The order is reversed every
    round.

    Args:
        rivals: Name and function; each function waits until its device has finished.
        repeats: Samples of a fast function.
        compiles: First runs compile kernels and count neither as samples nor for the budget.
        budget_seconds: Time after which a function is run no more; it has at least one sample.
        tick: Called with a name before every run.
        clock: Seconds, for tests.

    Returns:
        Median and spread per name.
    """
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    spent = dict.fromkeys(rivals, 0.0)

    def run(name: str) -> float:
        tick(name)
        start = clock()
        rivals[name]()
        seconds = clock() - start
        spent[name] += seconds
        return seconds

    for name in rivals:
        first = run(name)
        if compiles:
            spent[name] = 0.0
        elif first >= _SLOW:
            samples[name].append(first)
    for turn in range(repeats):
        for name in rivals if turn % 2 == 0 else reversed(list(rivals)):
            enough = len(samples[name]) >= repeats or spent[name] >= budget_seconds
            if not samples[name] or not enough:
                samples[name].append(run(name))
    return {name: Seconds.of(values) for name, values in samples.items()}


def fit_exponent(lengths: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Least-squares slope of ``log seconds`` over ``log n``: 1 is linear, 2 quadratic.

    Returns None for fewer than two different lengths.
    """
    if len(set(lengths)) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in (lengths, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
