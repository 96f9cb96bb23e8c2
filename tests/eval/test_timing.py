"""Timing: turns, budgets, and the fit of the exponent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longswift.eval.timing import Seconds, alternate, fit_exponent


class Clock:
    """Time that passes only inside the timed functions."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def job(self, name: str, *seconds: float):
        def run() -> None:
            done = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds[min(done, len(seconds) - 1)]

        return run


def test_rivals_take_turns_and_the_first_run_is_dropped() -> None:
    clock = Clock()
    rivals = {"a": clock.job("a", 4.0, 1.0, 2.0, 3.0), "b": clock.job("b", 1.0)}
    times = alternate(rivals, repeats=3, clock=lambda: clock.now)
    assert clock.calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert times["a"] == Seconds(median=2.0, fastest=1.0, slowest=3.0, samples=3)
    assert times["b"].samples == 3


def test_a_slow_first_run_counts_and_the_budget_ends_it() -> None:
    clock = Clock()
    rivals = {"slow": clock.job("slow", 40.0, 30.0), "fast": clock.job("fast", 1.0)}
    times = alternate(rivals, repeats=3, budget_seconds=60, clock=lambda: clock.now)
    assert times["slow"] == Seconds(median=35.0, fastest=30.0, slowest=40.0, samples=2)
    assert times["fast"].samples == 3


def test_a_first_run_that_compiles_never_counts() -> None:
    clock = Clock()
    rivals = {"a": clock.job("a", 40.0, 1.0)}
    times = alternate(rivals, repeats=3, compiles=True, budget_seconds=30, clock=lambda: clock.now)
    assert times["a"] == Seconds(median=1.0, fastest=1.0, slowest=1.0, samples=3)


def test_there_is_always_a_sample() -> None:
    clock = Clock()
    times = alternate({"a": clock.job("a", 3.0)}, budget_seconds=1.0, clock=lambda: clock.now)
    assert times["a"].samples == 1


@given(st.floats(0.2, 3.0), st.floats(1e-6, 10.0))
def test_the_exponent_of_a_power_law_is_found(exponent: float, factor: float) -> None:
    lengths = [256, 1024, 4096, 131072]
    assert fit_exponent(lengths, [factor * n**exponent for n in lengths]) == pytest.approx(exponent)


def test_noise_averages_out_and_one_length_fits_nothing() -> None:
    lengths = [1024, 2048, 4096, 8192]
    noisy = [n * f for n, f in zip(lengths, (1.1, 0.9, 1.1, 0.9), strict=True)]
    assert fit_exponent(lengths, noisy) == pytest.approx(1.0, abs=0.15)
    assert fit_exponent([1024], [1.0]) is None
    assert fit_exponent([1024, 1024], [1.0, 2.0]) is None
