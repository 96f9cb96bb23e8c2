"""A band as one interval of keys per row."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from tests.kernels.test_patterns import Problem, problems


@settings(max_examples=60)
@given(problems())
def test_intervals_are_the_band(problem: Problem) -> None:
    q_len, k_len, cpu = problem.q.shape[2], problem.k.shape[2], torch.device("cpu")
    pattern = problem.pattern
    first, end = pattern.intervals(q_len, k_len, cpu)
    key = torch.arange(k_len)
    inside = (key >= first[..., None]) & (key < end[..., None])
    expected = pattern.band_mask(q_len, k_len, cpu)[0]
    if pattern.causal:
        expected &= key <= torch.arange(k_len - q_len, k_len)[:, None]
    assert torch.equal(inside, expected)
    assert (first.diff(dim=1) >= 0).all() and (end.diff(dim=1) >= 0).all()
