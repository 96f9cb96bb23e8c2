"""Results that can be stored, averaged and read."""

from __future__ import annotations

import json

import pytest
import torch

from longswift import Full, MSSwift, SlidingWindow


def test_statistics_are_json() -> None:
    q = torch.randn(1, 2, 30, 8)
    stats = MSSwift()(q, q, q).stats
    assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()


def test_full_attention_is_dense() -> None:
    q = torch.randn(1, 2, 30, 8)
    for causal, keys in ((True, 15.5), (False, 30.0)):
        stats = Full()(q, q, q, causal=causal).stats
        assert stats.mode == "dense"
        assert stats.keys_per_query == pytest.approx(keys)
        assert stats.density == pytest.approx(1.0)
        assert stats.dense_rows == 1.0


def test_padding_is_averaged_over_rows() -> None:
    q = torch.randn(2, 1, 30, 8)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :20] = False
    stats = Full()(q, q, q, key_mask=mask).stats
    assert stats.keys_per_query == pytest.approx((15.5 + 5.5) / 2)
    nothing = Full()(q, q, q, key_mask=torch.zeros_like(mask)).stats
    assert nothing.keys_per_query == 0.0
    assert nothing.backend == "none"


def test_window_density() -> None:
    q = torch.randn(1, 1, 200, 8)
    stats = SlidingWindow(window=10)(q, q, q).stats
    assert stats.keys_per_query == pytest.approx(10 - 45 / 200)
    assert stats.mode == "static"
