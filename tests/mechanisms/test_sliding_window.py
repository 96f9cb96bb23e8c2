"""Sliding windows against the definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import ConfigError, SlidingWindow


def sees(position: int, key: int, window: int, first: int, causal: bool) -> bool:
    if causal:
        return key <= position and (position - key < window or key < first)
    return abs(position - key) <= window // 2 or key < first or position < first


@settings(max_examples=60)
@given(
    n=st.integers(1, 150),
    queries=st.integers(1, 150),
    window=st.integers(1, 200),
    first=st.integers(0, 70),
    causal=st.booleans(),
)
def test_definition(n: int, queries: int, window: int, first: int, causal: bool) -> None:
    q_len = min(n, queries) if causal else n
    mechanism = SlidingWindow(window=window, global_tokens=first)
    seen = mechanism.visible(torch.zeros(1, 2, q_len, 4), torch.zeros(1, 1, n, 4), causal=causal)
    expected = torch.tensor(
        [[sees(n - q_len + i, j, window, first, causal) for j in range(n)] for i in range(q_len)]
    )
    assert torch.equal(seen[0, 0], expected)
    assert torch.equal(seen[0, 1], expected)


@pytest.mark.parametrize("n", [1000, 1025])
@pytest.mark.parametrize("window", [64, 300])
def test_longer_than_a_tile(n: int, window: int) -> None:
    """Tiles of several hundred queries, merged rectangles and all."""
    q, k, v = torch.randn(3, 1, 1, n, 8, dtype=torch.float64)
    mechanism = SlidingWindow(window=window, global_tokens=3)
    for causal in (True, False):
        fast = mechanism(q, k, v, causal=causal)
        slow = mechanism.reference(q, k, v, causal=causal)
        torch.testing.assert_close(fast.out, slow.out, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{"window": 0}, {"window": -4}, {"window": 2.5}, {"window": None}, {"window": True}]
    + [{"global_tokens": -1}, {"global_tokens": 1.0}, {"global_tokens": True}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        SlidingWindow(**options)  # type: ignore[arg-type]
