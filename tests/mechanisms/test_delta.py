"""The delta correction against its definition, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, MSSwift
from longswift.mechanisms import delta as delta_module

SMALL: dict[str, Any] = {
    "windows": (16,),
    "sinks": 2,
    "key_tokens": 4,
    "block": 16,
    "selector": {"name": "bounds", "key_block": 4, "row_group": 4},
    "remainder": 16,
    "dense_below": 0,
}


def corrected(sparse: Tensor, exact: Tensor, offset: int, stride: int) -> Tensor:
    """Row ``i`` plus what its latest row at a multiple of ``stride`` missed."""
    rows = []
    for row in range(sparse.shape[2]):
        latest = (offset + row) // stride * stride - offset
        missed = exact[:, :, latest] - sparse[:, :, latest] if latest >= 0 else 0.0
        rows.append(sparse[:, :, row] + missed)
    return torch.stack(rows, 2)


@settings(max_examples=30)
@given(
    n=st.integers(30, 110),
    queries=st.integers(2, 110),
    stride=st.sampled_from([1, 4, 16]),
    causal=st.booleans(),
    training=st.booleans(),
    held=st.sampled_from([1, 1 << 22]),
)
def test_delta_is_its_definition(
    n: int, queries: int, stride: int, causal: bool, training: bool, held: int
) -> None:
    """Output, log-sum-exp and every gradient, however many scores are held at once."""
    queries = min(queries, n) if causal else n
    shapes = (2, 4, queries, 6), (2, 2, n, 6), (2, 2, n, 5)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options: dict[str, Any] = {"causal": causal, "training": training}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "_SCORES", held)
        fast = MSSwift(**SMALL, delta=stride)(*leaves, **options)
        weights = torch.randn_like(fast.out)
        found = torch.autograd.grad((fast.out * weights).sum() + fast.lse.sum(), leaves)
    sparse = MSSwift(**SMALL)(*leaves, **options)
    out = corrected(sparse.out, Full()(*leaves, causal=causal).out, n - queries, stride)
    expected = torch.autograd.grad((out * weights).sum() + sparse.lse.sum(), leaves)
    torch.testing.assert_close(fast.out, out, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(fast.lse, sparse.lse)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_delta_of_every_row_is_full_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 200, 8)
    found = MSSwift(**SMALL, delta=1)(q, k, v)
    torch.testing.assert_close(found.out, Full()(q, k, v).out)
    assert found.stats.density > 1.0


def test_delta_counts_the_keys_it_scores() -> None:
    q, k, v = torch.randn(3, 1, 2, 160, 8)
    plain, fixed = (MSSwift(**SMALL, delta=stride)(q, k, v).stats for stride in (None, 16))
    dense = round(160 * plain.dense_rows)
    scored = sum(position + 1 for position in range(dense, 160) if position % 16 == 0)
    assert fixed.keys_per_query - plain.keys_per_query == pytest.approx(scored / 160)


def test_decoding_is_not_corrected() -> None:
    q, k, v = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 161, 8)
    plain, fixed = MSSwift(**SMALL), MSSwift(**SMALL, delta=16)
    assert torch.equal(plain(q, k, v).out, fixed(q, k, v).out)
