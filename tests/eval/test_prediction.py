"""What one half of a text promises for the other, and its documents for others."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from longswift.eval import calibration_runs
from longswift.eval.calibration import Candidate, Tried, cheapest
from longswift.eval.calibration_runs import Calibration
from longswift.eval.calibration_summary import held, of_another
from longswift.eval.halves import CHECK, CHOOSE, STRETCH, Half
from longswift.eval.prediction import expected, margin, mean_share, pool, student
from longswift.mechanisms import get_mechanism


def half(part: int, number: int, **changes: int) -> Half:
    options = {"documents": 8, "first": 8, "end": 64, "count": 6, "seed": 0}
    return Half(part=part, number=number, **{**options, **changes})


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("end", [16, 61, 64])
def test_halves_are_disjoint_and_leave_nothing_out(number: int, end: int) -> None:
    one, two = (half(part, number, end=end).blocks() for part in (CHOOSE, CHECK))
    assert sorted(one + two) == list(range(8, end))
    assert abs(len(one) - len(two)) <= STRETCH
    # Whole stretches, not single blocks between blocks of the other half.
    for own in (one, two):
        runs = Counter((index - 8) // STRETCH for index in own)
        assert all(n == STRETCH or (run + 1) * STRETCH + 8 > end for run, n in runs.items())


def test_halves_lie_equally_late() -> None:
    places = [
        fmean(index for number in range(8) for index in half(part, number).blocks())
        for part in (CHOOSE, CHECK)
    ]
    assert places[0] == places[1]


def test_documents_fill_each_others_gaps() -> None:
    tried = [half(CHOOSE, number).tried(3) for number in range(8)]
    assert {len(one) for one in tried} <= {6, 7}
    for number, one in enumerate(tried):
        assert set(one) <= set(half(CHOOSE, number).blocks())
    assert tried != [half(CHOOSE, number).tried(4) for number in range(8)]
    assert tried != [half(CHOOSE, number, seed=1).tried(3) for number in range(8)]
    # Eight documents of 24 to 32 own blocks: hardly a block stays untried in all of them.
    every = {index for one in tried for index in one}
    assert len(every) >= 0.8 * len(range(8, 64))
    assert half(CHECK, 2, count=100).tried(0) == half(CHECK, 2).blocks()


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.706), (7, 2.365), (11, 2.201), (20, 2.086), (60, 2.000)]
)
def test_students_points(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, abs=3e-3)


def test_margin_of_a_mean() -> None:
    assert margin([0.5]) is None
    assert margin([0.1, 0.3]) == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2))


CANDIDATES = [Candidate(scale=0, key_tokens=budget) for budget in range(40)]
TARGET = 0.9


def document(rng: random.Random) -> dict[int, Tried]:
    """Forty settings that keep 0.9 on average, each with luck of its own in every document.

    None is better than another: whatever looks best where it was chosen keeps 0.9 elsewhere.
    """
    shares = [[rng.gauss(TARGET, 0.03)] for _ in CANDIDATES]
    costs = [[float(i)] for i in range(len(CANDIDATES))]
    return {0: Tried(shares=shares, costs=costs, dense=100.0)}


def test_documents_that_did_not_choose_are_judged_without_flattery() -> None:
    rng = random.Random(0)
    fitted, fair, new, covered = [], [], [], []
    for _ in range(150):
        documents = [document(rng) for _ in range(6)]
        chosen = {0: cheapest(pool(documents)[0], CANDIDATES, 1, TARGET)}
        other = expected(documents, CANDIDATES, 1, TARGET)
        assert other is not None and len(other.each) == 6
        fitted.append(fmean(mean_share(one, chosen, CANDIDATES) for one in documents))
        fair.append(other.mean)
        new.append(mean_share(document(rng), chosen, CANDIDATES))
        covered.append(other.low <= new[-1] <= other.high)
    # The choice flatters itself; leaving the judged document out takes that away.
    assert fmean(fitted) - fmean(new) > 0.006
    assert abs(fmean(fair) - fmean(new)) < 0.006
    assert 0.9 <= fmean(covered) <= 0.99
    assert expected(documents[:1], CANDIDATES, 1, TARGET) is None


def asked(file: Path | None, seed: int) -> Calibration:
    mechanism = get_mechanism(
        "ms_swift", windows=(64,), sinks=4, block=64, remainder=128, dense_below=512
    )
    return Calibration(
        mechanism=mechanism.to_dict(),
        target=0.8,
        budgets=(0, 8, 16, 32, 64),
        file=None if file is None else str(file),
        length=1536,
        documents=6,
        blocks=6,
        chunk=256,
        seed=seed,
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_one_half_predicts_the_other(seed: int, tmp_path: Path) -> None:
    # The packaged model and real text. A front and a back half would be 0.04 apart here, because
    # what a head keeps falls with the position.
    _, result = calibration_runs.run(asked(None, seed), tmp_path / "p.json", progress=False)
    found = result.summary
    assert found["off"] <= 0.01 and found["off"] <= found["off_margin"] <= 0.03
    assert 0.8 < found["predicted"] < 0.97
    # So short documents differ by more than the point that is asked for.
    assert "CANNOT BE TOLD from 6 documents" in found["verdict"]
    assert len(found["predicted_each"]) == len(found["checked_each"]) == 6


def test_documents_that_differ_make_the_prediction_uncertain(tmp_path: Path) -> None:
    from longswift.eval.documents import source

    prose = source(None)[:14_000]
    rng = random.Random(0)
    noise = "".join(rng.choice("0123456789abcdef ") for _ in range(9_000))
    file = tmp_path / "mixed.txt"
    file.write_text(prose + noise)
    _, result = calibration_runs.run(asked(file, 0), tmp_path / "p.json", progress=False)
    found = result.summary
    other = found["another"]
    assert "UNCERTAIN" in result.summary["verdict"]
    assert other["high"] - other["low"] > 0.05
    # Both halves have their share of either kind.
    assert found["off"] <= 0.02
    spread = max(found["predicted_each"]) - min(found["predicted_each"])
    assert spread > 5 * found["off"]


@pytest.mark.parametrize(
    ("off", "chance", "documents", "said"),
    [
        (0.003, 0.005, 8, "the prediction holds"),
        (0.009, 0.188, 2, "CANNOT BE TOLD from 2 documents"),
        (0.003, None, 1, "CANNOT BE TOLD from one document"),
        (0.020, 0.005, 8, "the prediction DOES NOT HOLD"),
        (0.020, 0.188, 2, "CANNOT BE TOLD"),
    ],
)
def test_the_interval_decides_what_can_be_told(
    off: float, chance: float | None, documents: int, said: str
) -> None:
    assert said in held(off, chance, documents)


def test_few_documents_are_uncertain_however_alike() -> None:
    alike = {"mean": 0.971, "low": 0.899, "high": 1.0, "each": [0.968, 0.974]}
    assert "UNCERTAIN, because 2 documents are few" in of_another(alike)
    many = {"mean": 0.966, "low": 0.946, "high": 0.986, "each": [0.96, 0.97, 0.975, 0.96]}
    assert "UNCERTAIN" not in of_another(many)
