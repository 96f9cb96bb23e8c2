"""A pattern as intervals: of keys per row, and of rows per gathered key."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import assume, given, settings

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


@settings(max_examples=40)
@given(problems())
def test_slots_are_the_gathered_mask(problem: Problem) -> None:
    q_len, k_len, cpu = problem.q.shape[2], problem.k.shape[2], torch.device("cpu")
    pattern = problem.pattern
    assume(pattern.tokens is not None)
    if pattern.visible_until is not None:
        # Mechanisms say "for ever" with numbers beyond 32 bits.
        until = pattern.visible_until.long()
        pattern = replace(pattern, visible_until=torch.where(until > k_len, 1 << 62, until))
    tokens, since, until = pattern.slots(cpu)
    position = torch.arange(k_len - q_len, k_len)
    block = position // pattern.block - (k_len - q_len) // pattern.block
    seen = (since[:, :, block] <= position[:, None]) & (position[:, None] < until[:, :, block])
    mask = torch.zeros(*seen.shape[:3], k_len + 1, dtype=torch.bool)
    mask.scatter_(3, torch.where(seen, tokens[:, :, block].long(), k_len), True)
    assert torch.equal(mask[..., :k_len], pattern.gathered_mask(q_len, k_len, cpu))
