"""``visible()`` tells the truth, and what it shows is legal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mechanisms.drawing import Inputs, allowed_pairs, inputs, masked_softmax, tolerance
from tests.mechanisms.table import CASES, Case

case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


@case_of
@settings(max_examples=20)
@given(st.data())
def test_no_future_no_padding_always_oneself(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case))
    training = data.draw(st.sampled_from(case.trainings))
    seen = case.build().visible(x.q, x.k, **x.options, training=training)
    allowed = allowed_pairs(x)
    assert seen.dtype == torch.bool
    assert seen.shape == (*x.q.shape[:3], x.k.shape[2])
    assert not (seen & ~allowed).any()
    if x.q.shape[2] <= x.k.shape[2] and (x.causal or x.q.shape[2] == x.k.shape[2]):
        own = seen.diagonal(x.k.shape[2] - x.q.shape[2], dim1=2, dim2=3)
        legal = allowed.diagonal(x.k.shape[2] - x.q.shape[2], dim1=2, dim2=3)
        assert torch.equal(own, legal)


@pytest.mark.parametrize("case", [c for c in CASES if c.subset], ids=lambda case: case.label)
@settings(max_examples=20)
@given(st.data())
def test_output_is_softmax_over_visible(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case))
    training = data.draw(st.sampled_from(case.trainings))
    mechanism = case.build()
    r = x.run(mechanism, training=training)
    out, lse = masked_softmax(x, mechanism.visible(x.q, x.k, **x.options, training=training))
    torch.testing.assert_close(r.out.double(), out, **tolerance(x.q.dtype))
    torch.testing.assert_close(r.lse.double(), lse, **tolerance(x.q.dtype))


EXACT = [c for c in CASES if c.build().exact_part() is not None]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.label)
def test_exact_part_is_softmax_over_visible(case: Case) -> None:
    kv_heads = case.kv_heads[-1]
    q, k, v = (torch.randn(1, h, 70, 8) for h in (2 * kv_heads, kv_heads, kv_heads))
    x = Inputs(q=q, k=k, v=v)
    mechanism = case.build()
    exact = mechanism.exact_part()
    assert exact is not None
    _, lse = masked_softmax(x, mechanism.visible(x.q, x.k))
    torch.testing.assert_close(x.run(exact).lse.double(), lse, **tolerance(torch.float32))


@case_of
@settings(max_examples=15)
@given(st.data())
def test_statistics_count_what_is_visible(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, masks=("none",)))
    mechanism = case.build()
    stats = x.run(mechanism, training=False).stats
    seen = mechanism.visible(x.q, x.k, **x.options).float().sum(-1).mean().item()
    assert stats.mechanism == mechanism.name
    assert stats.backend != "auto"
    if case.softmax:
        assert stats.keys_per_query >= 0.95 * seen
    full = allowed_pairs(x).float().sum(-1).mean().item()
    assert stats.density == pytest.approx(stats.keys_per_query / full)
    assert 0.0 <= stats.dense_rows <= 1.0
    assert stats.to_dict()["mechanism"] == mechanism.name


@case_of
def test_group_shares_the_keys_of_its_kv_head(case: Case) -> None:
    kv_heads = case.kv_heads[-1]
    q, k = torch.randn(1, 3 * kv_heads, 70, 8), torch.randn(1, kv_heads, 70, 8)
    seen = case.build().visible(q, k, causal=case.causal).unflatten(1, (kv_heads, 3))
    assert torch.equal(seen[:, :, 0], seen[:, :, 1])
    assert torch.equal(seen[:, :, 0], seen[:, :, 2])
