"""BigBird token by token: what must be seen, how much is drawn, what it does not depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import ConfigError, SlidingWindow
from longswift.mechanisms.bigbird_tokens import BigBirdTokens


@settings(max_examples=40)
@given(
    n=st.integers(1, 80),
    queries=st.integers(1, 80),
    window=st.integers(1, 30),
    first=st.integers(0, 5),
    ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    causal=st.booleans(),
)
def test_definition(
    n: int, queries: int, window: int, first: int, ratio: float, causal: bool
) -> None:
    """Nothing but random keys besides the window and the globals; all or none at the extremes."""
    q_len = min(n, queries) if causal else n
    q, k = torch.zeros(1, 2, q_len, 4), torch.zeros(1, 2, n, 4)
    mechanism = BigBirdTokens(window=window, global_tokens=first, random_ratio=ratio)
    fixed = SlidingWindow(window=window, global_tokens=first).visible(q, k, causal=causal)
    seen = mechanism.visible(q, k, causal=causal)
    assert not (fixed & ~seen).any()
    if ratio == 0.0:
        assert torch.equal(seen, fixed)
    if ratio == 1.0:
        assert int(seen.sum()) == 2 * sum(n - q_len + i + 1 if causal else n for i in range(q_len))
    whole = mechanism.visible(k, k, causal=causal)
    assert torch.equal(seen, whole[:, :, n - q_len :])
    stats = mechanism(q, k, k, causal=causal).stats
    assert stats.keys_per_query == pytest.approx(seen.sum().item() / 2 / q_len)


def test_the_share_is_as_asked_and_heads_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longswift.mechanisms.bigbird_tokens._PAIRS", 1000)
    mechanism = BigBirdTokens(window=1, global_tokens=0, random_ratio=0.15)
    q = torch.zeros(1, 3, 400, 4)
    seen = mechanism.visible(q, q, causal=False)[0].float()
    others = (seen.sum((1, 2)) - 400) / (400 * 399)
    assert (others - 0.15).abs().max() < 0.005
    for other in (seen[1], seen[0].T, BigBirdTokens(seed=1).visible(q, q, causal=False)[0, 0]):
        assert 0.1 < (seen[0] == other).float().mean() < 0.9
    longer = torch.zeros(1, 3, 450, 4)
    again = mechanism.visible(longer, longer, causal=False)[0, :, :400, :400]
    assert torch.equal(again.float(), seen)


@pytest.mark.parametrize(
    "options",
    [{"window": 0}, {"random_ratio": 1.1}, {"random_ratio": -0.1}, {"random_ratio": None}]
    + [{"random_ratio": True}, {"global_tokens": -1}, {"seed": 0.5}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        BigBirdTokens(**options)  # type: ignore[arg-type]
