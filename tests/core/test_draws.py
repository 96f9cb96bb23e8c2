"""Random numbers by coordinate: reproducible, independent of the amount, distinct, uniform."""

from __future__ import annotations

import numpy as np
import pytest

from longswift.core.draws import distinct, uniform


def test_a_number_depends_on_its_place_alone() -> None:
    rows, columns = np.arange(50)[:, None], np.arange(40)
    table = uniform(3, 1, rows, columns)
    assert table.shape == (50, 40)
    assert np.array_equal(table[:7, :5], uniform(3, 1, rows[:7], columns[:5]))
    assert table[9, 8] == uniform(3, 1, 9, 8)
    assert not (table == uniform(4, 1, rows, columns)).any()
    assert not (table == uniform(3, 2, rows, columns)).any()
    assert (table[:40] == table[:40].T).sum() == 40


@pytest.mark.parametrize("seed", [0, -1, 1 << 70])
def test_uniform(seed: int) -> None:
    x = uniform(seed, np.arange(200)[:, None], np.arange(200))
    assert x.min() >= 0.0 and x.max() < 1.0
    counts = np.histogram(x, bins=16, range=(0, 1))[0] / x.size * 16
    assert abs(counts - 1.0).max() < 0.1
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.02


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    uniform(1, np.arange(9))
    assert np.array_equal(np.random.random(3), expected)


def test_distinct_numbers() -> None:
    population = np.arange(12)
    drawn = distinct(3, population, 7, np.arange(4000)[:, None], np.arange(12))
    assert drawn.shape == (4000, 12, 3)
    for size in population:
        rows = np.sort(drawn[:, size])
        assert ((rows >= 0).sum(1) == min(size, 3)).all()
        assert rows.max() < size or size == 0
        assert (np.diff(rows) > 0)[rows[:, 1:] >= 0].all()
    frequency = np.bincount(drawn[:, 8].ravel(), minlength=8) / 4000
    assert abs(frequency - 3 / 8).max() < 0.04
