"""Selectors against their naive twins, and what they share: budgets filled in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.mechanisms.selectors.base import take_in_turn
from tests.mechanisms.naive import NaiveSwift
from tests.mechanisms.naive_selectors import NaiveAnchor, NaiveLowRank, NaivePooled
from tests.mechanisms.twins import compare

TWINS: dict[str, tuple[type[NaiveSwift], dict[str, Any]]] = {
    "lowrank": (NaiveLowRank, {"windows": (16, 32)}),
    "lowrank_sinks": (NaiveLowRank, {"windows": (16,), "sinks": 11, "rank": 1, "remainder": 16}),
    "lowrank_fit": (NaiveLowRank, {"windows": (16,), "fit": 24, "rank": 4, "key_tokens": 5}),
    "lowrank_whole": (NaiveLowRank, {"windows": (16,), "rank": 6, "coverage": 0.8}),
    "lowrank_tokens": (NaiveLowRank, {"windows": (24,), "block": 8, "key_block": 1}),
    "pooled": (NaivePooled, {"windows": (16, 32), "remainder": 24}),
    "pooled_variance": (NaivePooled, {"windows": (16,), "variance": True, "sinks": 9}),
    "pooled_only": (NaivePooled, {"windows": (16,), "proposals": 1, "coverage": 0.7}),
    "pooled_small": (NaivePooled, {"windows": (24,), "block": 8, "key_block": 4}),
    "anchor": (NaiveAnchor, {"windows": (16, 32), "remainder": 24}),
    "anchor_coverage": (NaiveAnchor, {"windows": (16,), "coverage": 0.7, "sinks": 11}),
    "anchor_every": (NaiveAnchor, {"windows": (16,), "stride": 1, "key_tokens": 7}),
    "anchor_last": (NaiveAnchor, {"windows": (24,), "stride": 64, "block": 8, "key_block": 4}),
}


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=10)
@given(st.data())
def test_naive_twin_agrees(name: str, data: st.DataObject) -> None:
    naive, options = TWINS[name]
    causal = data.draw(st.booleans())
    strict = causal and "coverage" not in options and data.draw(st.booleans())
    compare(naive(**options, causal=causal, strict=strict), data, fewest=1)


def taken_by(wanted: Tensor, budget: int, block: int) -> list[dict[int, int]]:
    """Per problem: key to the row that took it; fails when a key is taken twice."""
    index, row, taken = take_in_turn(wanted, budget, block)
    found = []
    for problem in range(len(wanted)):
        keys = index[problem][taken[problem]].tolist()
        assert len(keys) == len(set(keys)), "a key was taken twice and would be counted twice"
        found.append(dict(zip(keys, row[problem][taken[problem]].tolist(), strict=True)))
    return found


@settings(max_examples=150)
@given(
    rows=st.integers(1, 16),
    keys=st.integers(1, 20),
    budget=st.integers(1, 24),
    zeros=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**31),
)
def test_take_in_turn(rows: int, keys: int, budget: int, zeros: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(2, rows, keys, generator=generator)
    wanted = wanted * (torch.rand(2, rows, keys, generator=generator) >= zeros)
    found = taken_by(wanted, budget, 16)
    for problem, choice in enumerate(found):
        assert len(choice) <= budget
        for key, row in choice.items():
            assert wanted[problem, row, key] > 0
    # What a row took does not depend on the rows after it, not even on their number.
    for end in range(1, rows + 1):
        for whole, part in zip(found, taken_by(wanted[:, :end], budget, 16), strict=True):
            assert part == {key: row for key, row in whole.items() if row < end}


def test_a_key_nobody_wanted_stays_free() -> None:
    """Rows that want less than their share leave the rest to later rows."""
    wanted = torch.zeros(1, 4, 6)
    wanted[0, 3, 2] = 0.5
    assert taken_by(wanted, 8, 4) == [{2: 3}]
