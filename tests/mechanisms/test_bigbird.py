"""BigBird's layout: what is seen, how often, and what it does not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import ConfigError
from longswift.mechanisms.bigbird import BigBird

LAYOUTS = {
    "block": st.integers(1, 7),
    "random_blocks": st.integers(0, 4),
    "window_blocks": st.sampled_from([1, 3, 5]),
    "global_blocks": st.integers(0, 2),
    "last_global_blocks": st.integers(0, 2),
    "seed": st.integers(0, 5),
}


def seen_by(mechanism: BigBird, n: int, *, heads: int = 2, causal: bool) -> Tensor:
    q = torch.zeros(1, heads, n, 4)
    return mechanism.visible(q, q, causal=causal)[0]


@settings(max_examples=80)
@given(config=st.fixed_dictionaries(LAYOUTS), n=st.integers(1, 90), causal=st.booleans())
def test_definition(config: dict[str, Any], n: int, causal: bool) -> None:
    """Window and global blocks, and exactly as many others as asked for or as there are."""
    mechanism = BigBird(**config)
    seen = seen_by(mechanism, n, causal=causal)
    block, blocks = mechanism.block, -(-n // mechanism.block)
    side = mechanism.window_blocks // 2
    first = min(mechanism.global_blocks, blocks)
    last = blocks if causal else max(first, blocks - mechanism.last_global_blocks)
    for head in range(2):
        for row in range(n):
            i = row // block
            columns = [
                [bool(seen[head, row, j]) for j in range(c * block, min(n, (c + 1) * block))]
                for c in range(blocks)
            ]
            if causal:
                assert columns[i] == [j <= row for j in range(i * block, min(n, (i + 1) * block))]
                columns[i] = [True]
            assert all(len(set(column)) == 1 for column in columns)
            found = {c for c, column in enumerate(columns) if column[0]}
            present = set(range(i + 1)) if causal else set(range(blocks))
            fixed = {c for c in present if abs(c - i) <= side or c < first or c >= last}
            if not causal and (i < first or i >= last):
                fixed = present
            assert fixed <= found <= present
            assert len(found - fixed) == min(mechanism.random_blocks, len(present - fixed))
    q = torch.zeros(1, 2, n, 4)
    keys = mechanism(q, q, q, causal=causal).stats.keys_per_query
    assert keys == pytest.approx(seen.sum().item() / n / 2)


@settings(max_examples=20)
@given(config=st.fixed_dictionaries(LAYOUTS), n=st.integers(2, 90), data=st.data())
def test_a_longer_text_keeps_the_layout_of_its_beginning(
    config: dict[str, Any], n: int, data: st.DataObject
) -> None:
    mechanism = BigBird(**config)
    part = data.draw(st.integers(1, n - 1))
    whole = seen_by(mechanism, n, causal=True)
    assert torch.equal(seen_by(mechanism, part, causal=True), whole[:, :part, :part])
    q = torch.zeros(1, 2, n - part, 4)
    rest = mechanism.visible(q, torch.zeros(1, 2, n, 4))[0]
    assert torch.equal(rest, whole[:, part:])


def test_heads_and_seeds_differ_and_the_number_of_heads_does_not_matter() -> None:
    few = seen_by(BigBird(block=4), 200, heads=2, causal=False)
    assert torch.equal(few, seen_by(BigBird(block=4), 200, heads=5, causal=False)[:2])
    assert not torch.equal(few[0], few[1])
    assert not torch.equal(few, seen_by(BigBird(block=4, seed=1), 200, causal=False))


def test_training_and_evaluation_see_the_same() -> None:
    mechanism = BigBird(block=4, random_blocks=2)
    q = torch.randn(1, 2, 90, 8, requires_grad=True)
    for causal in (True, False):
        trained = mechanism(q, q, q, causal=causal, training=True)
        evaluated = mechanism(q.detach(), q.detach(), q.detach(), causal=causal, training=False)
        assert torch.equal(trained.out.detach(), evaluated.out)


def test_random_blocks_are_spread_evenly() -> None:
    """Over 300 heads every candidate of a row is drawn about equally often."""
    mechanism = BigBird(block=1, random_blocks=3, window_blocks=3, global_blocks=1)
    blocks = mechanism.key_blocks(1, 24, 300, causal=True)[:, 0]
    random = blocks[:, 1:].flatten()
    share = torch.bincount(random, minlength=22)[1:22] / 300
    assert random.min() == 1 and random.max() == 21
    assert (share - 3 / 21).abs().max() < 0.08


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"window_blocks": 2}, {"window_blocks": 0}, {"random_blocks": -1}]
    + [{"global_blocks": 1.0}, {"last_global_blocks": True}, {"seed": None}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        BigBird(**options)  # type: ignore[arg-type]
