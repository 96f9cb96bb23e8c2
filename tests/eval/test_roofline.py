"""The roofline: work counted, ceilings measured, and the bound they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift import get_mechanism
from longswift.eval.roofline import Ceilings, attention_work, measure_ceilings

SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "itemsize": 4}


def count(mechanism: Any, length: int) -> tuple[float, float]:
    """Work as counted, and as the keys that are visible one by one make it."""
    q = torch.randn(2, 4, length, 8)
    k, v = torch.randn(2, 2, 2, length, 8)
    stats = mechanism(q, k, v, causal=True).stats
    work = attention_work(**SHAPE, queries=length, keys=length, keys_per_query=stats.keys_per_query)
    pairs = int(mechanism.visible(q, k, causal=True).sum())
    # Two products, of which each multiplies and adds 8 numbers for every pair.
    return work.flops, 2 * 2 * 8 * pairs


@pytest.mark.parametrize(
    "mechanism",
    [
        get_mechanism("full"),
        get_mechanism("sliding_window", window=16, global_tokens=3),
        get_mechanism("longformer", left=10, global_tokens=2),
        get_mechanism("bigbird", block=8),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("length", [64, 77])
def test_operations_are_those_of_the_visible_pairs(mechanism: Any, length: int) -> None:
    counted, expected = count(mechanism, length)
    assert counted == pytest.approx(expected, rel=1e-6)


def test_bytes_are_the_tensors_once() -> None:
    work = attention_work(**SHAPE, queries=10, keys=30, keys_per_query=7.0)
    q = out = 2 * 4 * 10 * 8 * 4
    k = v = 2 * 2 * 30 * 8 * 4
    assert work.bytes == q + out + k + v
    both = attention_work(**SHAPE, queries=10, keys=30, keys_per_query=7.0, backward=True)
    assert (both.flops, both.bytes) == (3 * work.flops, 3 * work.bytes)


def test_the_slower_of_arithmetic_and_traffic_bounds() -> None:
    work = attention_work(**SHAPE, queries=10, keys=30, keys_per_query=7.0)
    assert work.seconds(Ceilings(flops=1.0, bytes=1e30)) == work.flops
    assert work.seconds(Ceilings(flops=1e30, bytes=1.0)) == work.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_are_rates_of_this_machine(dtype: torch.dtype) -> None:
    found = measure_ceilings(dtype)
    # No processor that runs Python is outside of these.
    assert 1e7 < found.flops < 1e16 and 1e7 < found.bytes < 1e14
