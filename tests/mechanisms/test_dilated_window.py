"""Dilated windows against the definition, and what they cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import ConfigError, SlidingWindow
from longswift.mechanisms.dilated_window import DilatedWindow


@settings(max_examples=60)
@given(
    n=st.integers(1, 90),
    queries=st.integers(1, 90),
    window=st.integers(1, 40),
    dilation=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    kv_heads=st.integers(1, 5),
    causal=st.booleans(),
)
def test_definition(
    n: int, queries: int, window: int, dilation: list[int], kv_heads: int, causal: bool
) -> None:
    q_len = min(n, queries) if causal else n
    mechanism = DilatedWindow(window=window, dilation=tuple(dilation))

    def sees(i: int, j: int, step: int) -> bool:
        distance, gap = divmod(i - j, step)
        if causal:
            return gap == 0 and 0 <= distance < window
        return gap == 0 and abs(distance) <= window // 2

    expected = torch.tensor(
        [
            [
                [sees(n - q_len + i, j, dilation[h % len(dilation)]) for j in range(n)]
                for i in range(q_len)
            ]
            for h in range(kv_heads)
        ]
    )
    q, k = torch.zeros(1, 2 * kv_heads, q_len, 4), torch.zeros(1, kv_heads, n, 4)
    seen = mechanism.visible(q, k, causal=causal)[0]
    assert torch.equal(seen, expected.repeat_interleave(2, 0))
    stats = mechanism(q, k, k, causal=causal).stats
    assert stats.keys_per_query == pytest.approx(expected.sum().item() / q_len / kv_heads)


def test_without_gaps_it_is_a_window() -> None:
    q, k, v = torch.randn(3, 2, 2, 90, 8)
    for causal in (True, False):
        dilated = DilatedWindow(window=9, dilation=1)(q, k, v, causal=causal)
        plain = SlidingWindow(window=9)(q, k, v, causal=causal)
        assert torch.equal(dilated.out, plain.out)


@pytest.mark.parametrize(
    "options",
    [{"window": 0}, {"dilation": 0}, {"dilation": ()}, {"dilation": (1, 0)}]
    + [{"dilation": 2.0}, {"dilation": "12"}, {"dilation": True}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        DilatedWindow(**options)  # type: ignore[arg-type]
