"""Partial results over disjoint keys merge to the softmax over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift.core.softmax import accumulator_dtype, merge, safe_exp_difference, softmax_partial
from longswift.core.types import Partial


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    shift=st.sampled_from([0.0, 300.0, -300.0]),
    hidden=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merge_is_the_whole(sizes: list[int], shift: float, hidden: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randn(2, 3, n, generator=generator, dtype=torch.float64) * 5 + shift
    if hidden and n:
        scores[:, 1] = -math.inf
        scores[0, 0, ::2] = -math.inf
    v = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    whole = softmax_partial(scores, v)
    parts = [
        softmax_partial(s, x)
        for s, x in zip(scores.split(sizes, -1), v.split(sizes, 1), strict=True)
    ]
    merged = merge(*parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-12, atol=1e-14)
    backwards = merge(*parts[::-1])
    torch.testing.assert_close(backwards.out, whole.out, rtol=1e-12, atol=1e-14)
    if hidden and n:
        assert not merged.out[:, 1].any()
        assert (merged.lse[:, 1] == -math.inf).all()


def test_empty_rows_have_finite_gradients() -> None:
    scores = torch.full((2, 3), -math.inf, dtype=torch.float64)
    scores[0] = torch.tensor([1.0, 2.0, 3.0])
    scores.requires_grad_()
    v = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    part = softmax_partial(scores, v)
    (grad,) = torch.autograd.grad(part.out.sum(), v)
    assert grad.isfinite().all()
    assert not part.out[1].any()


def test_merged_empty_rows_have_finite_gradients() -> None:
    inf = math.inf
    lses = [
        torch.tensor([0.5, -inf, -inf], dtype=torch.float64, requires_grad=True),
        torch.tensor([1.5, 2.0, -inf], dtype=torch.float64, requires_grad=True),
    ]
    outs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in lses]
    merged = merge(*(Partial(out, lse) for out, lse in zip(outs, lses, strict=True)))
    loss = merged.out.sum() + merged.lse[merged.lse.isfinite()].sum()
    for grad in torch.autograd.grad(loss, [*outs, *lses]):
        assert grad.isfinite().all()
        assert not grad[2].any()


def test_safe_exp_difference() -> None:
    inf = math.inf
    lse = torch.tensor([0.0, -inf, -inf, 5.0])
    total = torch.tensor([1.0, 3.0, -inf, 5.0])
    expected = torch.tensor([math.exp(-1), 0.0, 0.0, 1.0])
    torch.testing.assert_close(safe_exp_difference(lse, total), expected)


def test_one_part_is_itself() -> None:
    part = Partial(torch.randn(2, 3), torch.randn(2))
    assert merge(part) is part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulators_are_fp32_or_better(dtype: torch.dtype) -> None:
    assert accumulator_dtype(dtype) == torch.float32
    assert accumulator_dtype(torch.float64) == torch.float64
