"""Selectors against their naive twins, and what they share: budgets filled in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import MSSwift
from longswift.mechanisms.selectors.base import take_in_turn
from longswift.mechanisms.selectors.box_tree import descend, enclose
from longswift.mechanisms.selectors.centroids import Centroids, centroids
from tests.mechanisms.naive import NaiveSwift
from tests.mechanisms.naive_selectors import (
    NaiveAnchor,
    NaiveCentroids,
    NaiveLowRank,
    NaivePooled,
    NaiveTree,
)
from tests.mechanisms.twins import compare

TOKENS: dict[str, Any] = {"windows": (16,), "key_block": 1, "key_tokens": 2}
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
    "tree": (NaiveTree, {"windows": (16, 32), "key_tokens": 5, "proposals": 1, "key_block": 2}),
    "tree_beam": (NaiveTree, {**TOKENS, "beam": 2, "sinks": 11, "proposals": 1}),
    "tree_wide": (NaiveTree, {**TOKENS, "tree": 4, "proposals": 1}),
    "tree_deep": (NaiveTree, {**TOKENS, "block": 8}),
    "tree_centres": (NaiveTree, {**TOKENS, "row_radius": 0.0}),
    "centroids": (NaiveCentroids, {"windows": (16, 32), "remainder": 24, "key_tokens": 7}),
    "centroids_coverage": (NaiveCentroids, {"windows": (16,), "coverage": 0.8, "sinks": 11}),
    "centroids_few": (NaiveCentroids, {"windows": (24,), "block": 8, "rows": 1, "proposals": 1}),
    "centroids_tokens": (NaiveCentroids, {**TOKENS, "least_share": 0.5, "proposals": 1}),
    "centroids_odd": (NaiveCentroids, {"windows": (16,), "block": 24, "rows": 2, "key_block": 1}),
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


@settings(max_examples=20)
@given(st.data())
def test_centroids_are_weighed_by_a_sample_where_keys_are_many(data: st.DataObject) -> None:
    sample = {"many": 60, "tile": 16, "every": 2, "first": 0}
    naive = NaiveCentroids(
        windows=(16,), key_tokens=6, proposals=1, causal=data.draw(st.booleans()), **sample
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sample.items():
            patch.setattr(f"longswift.mechanisms.selectors.centroids._{name.upper()}", value)
        compare(naive, data, fewest=16)


@pytest.mark.parametrize("rows", [1, 2, 17, 51, 128, 384])
@pytest.mark.parametrize("most", [1, 3, 4])
def test_no_group_has_too_many_rows(rows: int, most: int) -> None:
    # Rows that differ in one channel only: groups are stretches of them.
    q = torch.zeros(2, rows, 5, dtype=torch.float64)
    q[:, :, 3] = torch.arange(rows)
    means = centroids(q[:, torch.randperm(rows)], most)[..., 3].sort(-1).values
    assert means.shape[1] >= rows / most
    assert (means[:, :1] <= (most - 1) / 2).all()
    assert (means[:, -1:] >= rows - 1 - (most - 1) / 2).all()
    assert (means.diff() <= most).all()


@pytest.mark.parametrize("rows", [2, 5, 17])
def test_every_row_of_a_question_finds_its_key(rows: int) -> None:
    """Far from each other, so that a mean of any two would find neither."""
    keys = torch.zeros(1, 1, 5000, 32)
    q = torch.zeros(1, 3, 4900 + rows, 32)[:, :, -rows:]
    wanted = torch.arange(3 * rows) * 60 + 31
    directions = torch.nn.functional.normalize(torch.randn(3 * rows, 32), dim=-1)
    keys[0, 0] = 0.1 * torch.randn(5000, 32)
    keys[0, 0, wanted] = directions
    q[0] = 60 * directions.view(3, rows, 32)
    mechanism = MSSwift(key_tokens=3 * rows, dense_below=0, selector=Centroids(proposals=1))
    seen = mechanism.visible(q, keys[:, :, : 4900 + rows])
    assert seen[0].any(0).any(0)[wanted].all()


@pytest.mark.parametrize("name", ["bounds", "centroids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_looks_further_the_more_pages_there_are(name: str, dtype: torch.dtype) -> None:
    """Pages whose keys are large in different channels seem better than the one that is asked for.

    They are as large a share of the pages at every length.
    """
    for pages in (100, 800):
        keys = torch.zeros(1, 1, pages, 16, 32, dtype=dtype)
        for channel in range(16):
            keys[:, :, : pages // 8, channel, [channel, channel + 16]] = 1.0
        keys[0, 0, pages // 2, 5] = 0.25
        keys = keys.flatten(2, 3)
        q = torch.full((1, 2, 1, 32), 9.0, dtype=dtype)
        options: dict[str, Any] = {"name": name, "proposals": 1, "most_proposals": 2}
        found = []
        for share in (0.0, 0.1875):
            selector = options | {"least_share": share, "page_radius": 1.0}
            mechanism = MSSwift(windows=(128,), key_tokens=16, dense_below=0, selector=selector)
            found.append(bool(mechanism.visible(q, keys)[0, 0, 0, pages // 2 * 16 + 5]))
        assert found == [False, True]


def test_what_follows_a_row_proposes_nothing_more_to_it() -> None:
    """A block's only row chooses the same keys however many rows of other blocks come with it."""
    q, k = torch.randn(1, 2, 1500, 8), torch.randn(1, 1, 2500, 8)
    mechanism = MSSwift(
        windows=(16,),
        key_tokens=16,
        block=8,
        dense_below=0,
        selector=Centroids(proposals=1, most_proposals=1, least_share=0.1),
    )
    rows = slice(1007 - 1000, None)
    seen = [
        mechanism.visible(q[:, :, :end][:, :, rows], k[:, :, : 1000 + end])[:, :, 0, :1007]
        for end in (9, 1500)
    ]
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    "selector",
    [
        {"name": "centroids", "key_block": 4, "proposals": 1, "rows": 2},
        {"name": "bounds", "key_block": 4, "proposals": 1, "tree": 2},
        {"name": "lowrank", "key_block": 4, "proposals": 1, "rank": 2},
        {"name": "lowrank", "key_block": 4, "proposals": 1, "rank": 2, "fit": 50},
        {"name": "pooled", "key_block": 4, "proposals": 1, "variance": True},
        {"name": "anchor", "key_block": 4, "stride": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_the_future_changes_no_choice(selector: dict[str, Any], training: bool) -> None:
    """Budgets so tight, and a future so different, that anything it told would show."""
    mechanism = MSSwift(
        windows=(16,), sinks=0, key_tokens=4, block=8, dense_below=0, selector=selector
    )
    q, k = torch.randn(1, 6, 260, 8), torch.randn(1, 2, 260, 8)
    seen = mechanism.visible(q, k, training=training)
    for token in (100, 131, 200, 255):
        changed = [x.clone() for x in (q, k)]
        for x in changed:
            x[:, :, token:, :] = 0.0
            x[:, :, token:, 3] = 30.0
        rows = token if training else token // 8 * 8
        found = mechanism.visible(*changed, training=training)
        assert torch.equal(found[:, :, :rows], seen[:, :, :rows])
        assert not torch.equal(found[:, :, rows:], seen[:, :, rows:])


@pytest.mark.parametrize("causal", [True, False])
def test_a_tree_whose_every_box_is_opened_is_the_flat_choice(causal: bool) -> None:
    q, k = torch.randn(2, 6, 500, 8), torch.randn(2, 2, 500, 8)
    options: dict[str, Any] = {"key_block": 4, "row_group": 4, "proposals": 2, "most_proposals": 2}
    options.update(key_radius=0.5, row_radius=0.25)
    block = {"windows": (16,), "key_tokens": 16, "block": 16, "dense_below": 0, "remainder": None}
    seen = [
        MSSwift(**block, selector={"name": "bounds", **options, **tree}).visible(
            q, k, causal=causal
        )
        for tree in ({}, {"tree": 4, "beam": 32}, {"tree": 2, "beam": 1})
    ]
    assert torch.equal(seen[0], seen[1])
    # Eight boxes opened a level are too few for that, and still find most of it.
    assert 0.5 < (seen[0] & seen[2]).sum() / seen[0].sum() < 1.0


@settings(max_examples=25)
@given(
    leaves=st.integers(1, 40),
    branch=st.sampled_from([2, 4]),
    levels=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_opening_every_box_finds_the_best_of_all(
    leaves: int, branch: int, levels: int, seed: int
) -> None:
    """The descent itself, from any level: candidates anywhere, the last node cut."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(1, 2, leaves, 3, generator=generator, dtype=torch.float64)
    high = low + torch.rand(1, 2, leaves, 3, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 2, 5, 4, 3, generator=generator, dtype=torch.float64).abs()
    outside = torch.rand(2, 5, leaves, generator=generator) < 0.7
    boxes = [(low, high)]
    for _ in range(levels):
        boxes.append(enclose(*boxes[-1], branch))
    # Rows without a negative channel: the bound is the product with the maximum.
    factors = [[high.flatten(0, 1)] for _, high in boxes]
    index, real = descend(
        [rows],
        factors,
        outside,
        branch=branch,
        kept=leaves,
        most=6,
        sinks=1,
        leaves=leaves,
    )
    share = (rows @ high.unsqueeze(2).transpose(3, 4)).masked_fill(
        ~outside[:, :, None], float("-inf")
    )
    rank = share.softmax(-1).amax(3).nan_to_num(0.0)
    rank[..., :1] = 0.0
    for head in range(2):
        for block in range(5):
            best = rank[0, head, block].topk(min(6, leaves))
            expected = set(best.indices[best.values > 0].tolist())
            assert set(index[0, head, block][real[0, head, block]].tolist()) == expected


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
