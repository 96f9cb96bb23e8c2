"""Longformer against its definition, pair by pair, and its global rows with other projections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import ConfigError, SlidingWindow, UnsupportedError
from longswift.mechanisms.longformer import Longformer, attend_with_global_projections


@settings(max_examples=60)
@given(
    n=st.integers(1, 150),
    queries=st.integers(1, 150),
    left=st.integers(0, 90),
    right=st.integers(0, 90),
    first=st.integers(0, 3),
    more=st.sets(st.integers(0, 160), max_size=5),
    causal=st.booleans(),
)
def test_definition(
    n: int, queries: int, left: int, right: int, first: int, more: set[int], causal: bool
) -> None:
    q_len = min(n, queries) if causal else n
    mechanism = Longformer(
        left=left, right=right, global_tokens=first, global_positions=tuple(more)
    )
    everywhere = set(range(first)) | more

    def sees(i: int, j: int) -> bool:
        if causal:
            return j <= i and (i - j <= left or j in everywhere)
        return -right <= i - j <= left or j in everywhere or i in everywhere

    expected = torch.tensor([[sees(n - q_len + i, j) for j in range(n)] for i in range(q_len)])
    q, k = torch.zeros(1, 2, q_len, 4), torch.zeros(1, 1, n, 4)
    assert torch.equal(mechanism.visible(q, k, causal=causal)[0, 1], expected)
    stats = mechanism(q, k, k, causal=causal).stats
    assert stats.keys_per_query == pytest.approx(expected.sum().item() / q_len)


def test_a_sliding_window_is_a_special_case() -> None:
    q, k, v = torch.randn(3, 1, 2, 130, 8)
    window = SlidingWindow(window=21, global_tokens=3)
    same = Longformer(left=20, global_tokens=3), Longformer(left=10, right=10, global_tokens=3)
    for causal, longformer in zip((True, False), same, strict=True):
        assert torch.equal(
            longformer(q, k, v, causal=causal).out, window(q, k, v, causal=causal).out
        )


def test_global_rows_with_their_own_projections() -> None:
    """Padded rows, grouped heads, a global position that only one of the rows has."""
    mechanism = Longformer(left=5, right=3, global_tokens=1, global_positions=(20, 45))
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :7] = False
    leaves = [
        torch.randn(2, heads, 50, 6, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2) * 2
    ]
    local, projected = tuple(leaves[:3]), tuple(leaves[3:])
    got = attend_with_global_projections(mechanism, local, projected, key_mask=mask)
    rows = torch.zeros(2, 50, dtype=torch.bool)
    rows[0, [0, 20, 45]] = rows[1, [7, 27]] = True
    rows = rows[:, None, :, None]
    plain = mechanism(*local, causal=False, key_mask=mask).out
    k, v = (x.repeat_interleave(2, 1) for x in projected[1:])
    scores = projected[0] @ k.transpose(2, 3) * 6**-0.5
    full = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1) @ v
    expected = torch.where(rows, full, plain)
    torch.testing.assert_close(got.out, expected)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((got.out * weights).sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_no_global_token_at_all() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    mechanism = Longformer(left=5, right=5, global_tokens=0, global_positions=(99,))
    got = attend_with_global_projections(mechanism, (q, k, v), (k, v, q))
    assert torch.equal(got.out, mechanism(q, k, v, causal=False).out)


def test_positions_are_a_set() -> None:
    assert Longformer(global_positions=[9, 4, 9]).global_positions == (4, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"left": -1}, {"right": 1.5}, {"global_tokens": True}, {"left": None}]
    + [{"global_positions": (3, -1)}, {"global_positions": 7}, {"global_positions": ("a",)}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        Longformer(**options)  # type: ignore[arg-type]


def test_windows_need_aligned_positions() -> None:
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="Lq == Lk"):
        Longformer()(q[:, :, :4], q, q, causal=False)
