"""MS-SWIFT against its naive twin, and its options one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import ConfigError, Full, MSSwift, UnsupportedError
from longswift.core.summary import KeySummary, PoolSums
from longswift.mechanisms.selectors import SELECTORS
from longswift.memory.paged_kv import PagedKV
from tests.mechanisms.naive import NaiveAntidiagonal, NaiveSwift
from tests.mechanisms.twins import compare

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"windows": (32,)},
    "scales": {"windows": (16, 32, 64), "key_tokens": 8},
    "overlap": {"windows": (48,), "overlap": 0.25},
    "coverage": {"windows": (16,), "coverage": 0.8, "key_tokens": 24},
    "many_sinks": {"windows": (16,), "sinks": 11, "key_tokens": 9},
    "no_sinks": {"windows": (16,), "sinks": 0, "key_tokens": 5, "proposals": 1},
    "dense_start": {"windows": (16,), "dense_below": 40},
    "small_blocks": {"windows": (8, 24), "block": 8, "key_block": 4, "row_group": 2},
    "odd_groups": {"windows": (16,), "row_group": 8, "proposals": 4, "key_tokens": 6},
    "pools": {"windows": (16, 32), "remainder": 24, "key_tokens": 8},
    "small_pools": {"windows": (16,), "remainder": 8, "key_tokens": 8},
}
ANTIDIAGONAL: dict[str, dict[str, Any]] = {
    "plain": {"windows": (16, 32), "key_tokens": 24},
    "coverage": {"windows": (16,), "coverage": 0.6, "key_tokens": 32, "remainder": 16},
    "stride": {"windows": (16,), "key_block": 4, "stride": 2, "sinks": 9, "key_tokens": 11},
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12)
@given(st.data())
def test_naive_twin_agrees(name: str, data: st.DataObject) -> None:
    """The same keys, hence the same output; fp64, where random scores have no ties."""
    causal = data.draw(st.booleans())
    strict = causal and CONFIGS[name].get("coverage") is None and data.draw(st.booleans())
    compare(NaiveSwift(**CONFIGS[name], causal=causal, strict=strict), data)


@pytest.mark.parametrize("name", ANTIDIAGONAL)
@settings(max_examples=8)
@given(st.data())
def test_naive_antidiagonal_agrees(name: str, data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    compare(NaiveAntidiagonal(**ANTIDIAGONAL[name], causal=causal), data)


SMALL: dict[str, Any] = {
    "windows": (32,),
    "sinks": 4,
    "key_tokens": 16,
    "block": 16,
    "selector": {"name": "bounds", "key_block": 8, "row_group": 4},
    "dense_below": 0,
    "remainder": 32,
}


def small(**options: Any) -> MSSwift:
    return MSSwift(**{**SMALL, **options})


def planted(n: int, at: int, *, heads: int = 1, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence whose last 8 queries ask for one key far back; everything else is faint."""
    q, k, v = (0.1 * torch.randn(1, heads, n, dim) for _ in range(3))
    needle = torch.randn(dim)
    q[:, :, -8:] = 6 * needle
    k[:, :, at] = 6 * needle
    v[:, :, at] = 1.0
    return q, k, v


@pytest.mark.parametrize("selector", SELECTORS.names())
@pytest.mark.parametrize("at", [9, 100, 200])
def test_a_needle_is_found(selector: str, at: int) -> None:
    mechanism = small(selector={"name": selector, "key_block": 8}, remainder=None)
    q, k, v = planted(320, at)
    r = mechanism(q, k, v)
    assert mechanism.visible(q, k)[0, 0, -1, at]
    torch.testing.assert_close(r.out[0, 0, -8:], torch.ones(8, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"name": "lowrank"}, {"name": "anchor", "stride": 1}])
@pytest.mark.parametrize("at", [9, 100, 200])
def test_a_needle_is_found_while_training_and_decoding(options: dict[str, Any], at: int) -> None:
    mechanism = small(key_tokens=64, selector={"name": "bounds", "key_block": 8, **options})
    q, k, v = planted(320, at)
    assert mechanism.visible(q, k, training=True)[0, 0, -8:, at].all()
    assert mechanism.visible(q[:, :, -1:], k)[0, 0, 0, at]
    step = mechanism(q[:, :, -1:], k, v)
    torch.testing.assert_close(step.out[0, 0, 0], torch.ones(8), atol=1e-3, rtol=0)


def test_decoding_chooses_the_most_probable_tokens() -> None:
    """With enough proposals, the picks are the best keys outside window and sinks.

    The sum that heads are weighed by takes the best of every 16 candidates.
    """
    mechanism = small(selector={"name": "bounds", "key_block": 8, "proposals": 64})
    q, k = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 301, 8)
    seen = mechanism.visible(q, k)
    # The tile of position 300 starts at 288 and its window reaches 16 keys before it.
    scores = torch.einsum("bhgd,bhkd->bhgk", q.view(2, 2, 3, 8), k) * 8**-0.5
    window = 288 - 16
    assert seen[..., window:].all()
    assert seen[..., :4].all()
    picked = seen[..., 4:window].sum(-1)
    assert (picked == 16).all()
    window_lse = scores[..., window:].logsumexp(-1, keepdim=True)
    rest_lse = scores[..., :window].unflatten(-1, (-1, 16)).amax(-1).logsumexp(-1, keepdim=True)
    probs = (scores[..., 4:window] - torch.logaddexp(window_lse, rest_lse)).exp()
    best = probs.amax(2).topk(16, -1).indices + 4
    expected = torch.zeros(2, 2, 301, dtype=torch.bool).scatter_(2, best, True)[..., 4:window]
    for group in range(3):
        assert torch.equal(seen.view(2, 2, 3, 301)[:, :, group, 4:window], expected)


@settings(max_examples=20)
@given(st.integers(1, 200), st.integers(0, 2**31), st.booleans())
def test_summaries_change_nothing(n: int, seed: int, one: bool) -> None:
    """Page summaries kept by a cache only save work."""
    generator = torch.Generator().manual_seed(seed)
    q_len = 1 if one else max(1, n // 3)
    q = torch.randn(2, 4, q_len, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 8, generator=generator, dtype=torch.float64)
    for selector in SELECTORS.names():
        mechanism = small(selector={"name": selector, "key_block": 16}, remainder=64, block=32)
        summary = KeySummary.build(k, v, 16)
        plain, helped = mechanism(q, k, v), mechanism(q, k, v, summary=summary)
        torch.testing.assert_close(plain.out, helped.out, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(plain.lse, helped.lse, rtol=1e-9, atol=1e-11)


@settings(max_examples=30)
@given(st.data())
def test_few_rows_are_decoded_one_by_one(data: st.DataObject) -> None:
    """What checks some tokens together chooses what decoding each of them would choose."""
    options = data.draw(
        st.sampled_from(
            [
                {},
                {"selector": "centroids"},
                {"selector": "pooled"},
                {"key_tokens": (16, 8)},
                {"dense_heads": (1,)},
                {"coverage": 0.8},
                {"min_coverage": 0.5},
                {"dense_below": 200},
            ]
        )
    )
    mechanism, rows = small(**options), data.draw(st.integers(2, 8))
    n = data.draw(st.integers(rows, 260))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q = torch.randn(2, 4, rows, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, n, 16, generator=generator)
    cache = PagedKV()
    with torch.no_grad():
        keys, values = cache.append(k, v)
        together = mechanism(q, keys, values, summary=cache.summary((0, 0)))
        # Its own cache, which grows.
        cache, parts = PagedKV(), []
        cache.append(k[:, :, : n - rows], v[:, :, : n - rows])
        for row in range(rows):
            end = n - rows + row + 1
            given_keys = cache.append(k[:, :, end - 1 : end], v[:, :, end - 1 : end])
            part = mechanism(q[:, :, row : row + 1], *given_keys, summary=cache.summary((0, 0)))
            parts.append(part)
    torch.testing.assert_close(together.out, torch.cat([p.out for p in parts], 2))
    torch.testing.assert_close(together.lse, torch.cat([p.lse for p in parts], 2))
    mean = sum(p.stats.keys_per_query for p in parts) / rows
    assert together.stats.keys_per_query == pytest.approx(mean)


def test_few_rows_are_exact_where_choosing_costs_more() -> None:
    """By default, as a single one is: up to four times as many bytes, or without summaries."""
    mechanism = MSSwift()
    k = torch.zeros(1, 2, 1, 64).expand(1, 2, 40_000, 64)
    for rows, summarised in ((1, False), (4, False), (8, False), (4, True), (8, True)):
        assert mechanism._is_dense(rows, k, summarised)
    assert not mechanism._is_dense(1, k, True) and not mechanism._is_dense(9, k, False)
    assert mechanism.reads_summary(1, k) and not mechanism.reads_summary(4, k)


def test_decoding_by_head_groups_sums_no_page_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with budgets of their own find their pools among those that the cache remembers."""
    mechanism = small(
        selector={"name": "bounds", "key_block": 16},
        remainder=64,
        block=32,
        key_tokens=(8, 16, 8, 16),
        dense_heads=(3,),
    )
    pages = PagedKV()
    pages.append(*torch.randn(2, 1, 4, 300, 8, dtype=torch.float64))
    asked: list[PoolSums] = []
    real = PoolSums.of

    def of(self: PoolSums, summary: KeySummary, factor: int) -> tuple[Tensor, Tensor]:
        asked.append(self)
        return real(self, summary, factor)

    monkeypatch.setattr(PoolSums, "of", of)
    for _ in range(70):
        k, v = pages.append(*torch.randn(2, 1, 4, 1, 8, dtype=torch.float64))
        q = torch.randn(1, 8, 1, 8, dtype=torch.float64)
        helped, plain = mechanism(q, k, v, summary=pages.summary()), mechanism(q, k, v)
        torch.testing.assert_close(plain.out, helped.out, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(plain.lse, helped.lse, rtol=1e-9, atol=1e-11)
    assert asked and all(sums is pages._pools for sums in asked)


@pytest.mark.parametrize("start", [(0, 40), (40, 40), (23, 0, 23)])
def test_decoding_padded_rows_sums_no_page_twice(
    monkeypatch: pytest.MonkeyPatch, start: tuple[int, ...]
) -> None:
    """Rows that start elsewhere complete their pools at other times, and remember them all."""
    mechanism = small(selector={"name": "bounds", "key_block": 16}, remainder=64, block=32)
    batch = len(start)
    pages = PagedKV()
    pages.append(*torch.randn(2, batch, 2, 300, 8, dtype=torch.float64))
    summed: list[int] = []
    real = PoolSums.of

    def of(self: PoolSums, summary: KeySummary, factor: int) -> tuple[Tensor, Tensor]:
        before = self._known[factor][0].shape[2] if factor in self._known else 0
        found = real(self, summary, factor)
        summed.append(self._known[factor][0].shape[2] - before)
        return found

    monkeypatch.setattr(PoolSums, "of", of)
    for step in range(140):
        if step == 100:
            # Shorter than the pools that are remembered.
            pages.crop(290)
        k, v = pages.append(*torch.randn(2, batch, 2, 1, 8, dtype=torch.float64))
        q = torch.randn(batch, 4, 1, 8, dtype=torch.float64)
        mask = torch.arange(k.shape[2]) >= torch.tensor(start)[:, None]
        helped = mechanism(q, k, v, key_mask=mask, summary=pages.summary(start))
        plain = mechanism(q, k, v, key_mask=mask)
        torch.testing.assert_close(plain.out, helped.out, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(plain.lse, helped.lse, rtol=1e-9, atol=1e-11)
    # Of 430 tokens, pools of 64; at most two are cropped and summed again.
    assert 0 < sum(summed) <= len(set(start)) * (430 // 64 + 2)


def test_summaries_follow_left_padding() -> None:
    k, v = torch.randn(2, 2, 2, 150, 8, dtype=torch.float64)
    q = torch.randn(2, 4, 1, 8, dtype=torch.float64)
    pad = 23
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[:, :pad] = False
    inner = KeySummary.build(k[:, :, pad:], v[:, :, pad:], 16)
    summary = replace(inner, start=(pad, pad))
    mechanism = small(selector={"name": "bounds", "key_block": 16}, block=32)
    helped = mechanism(q, k, v, key_mask=mask, summary=summary)
    torch.testing.assert_close(helped.out, mechanism(q, k, v, key_mask=mask).out)
    # Rows that start elsewhere share no pages: the summary is not used, the answer is the same.
    mask[1, pad : pad + 3] = False
    helped = mechanism(q, k, v, key_mask=mask, summary=summary)
    torch.testing.assert_close(helped.out, mechanism(q, k, v, key_mask=mask).out)


@pytest.mark.parametrize("causality", ["shared", "strict"])
def test_causality_can_be_fixed(causality: str) -> None:
    mechanism = small(causality=causality)
    q, k, v = torch.randn(3, 1, 2, 200, 8)
    for training in (False, True):
        assert mechanism(q, k, v, training=training).stats.mode == causality


def test_more_coverage_sees_more() -> None:
    q, k = torch.randn(2, 1, 2, 300, 8) * 2
    seen = [
        small(coverage=share, key_tokens=128).visible(q, k).sum().item()
        for share in (0.1, 0.5, 0.9, 1.0)
    ]
    assert seen == sorted(seen)
    assert seen[0] < seen[2]
    fixed = small(key_tokens=128).visible(q, k).sum().item()
    assert seen[3] <= fixed


def test_the_remainder_brings_the_output_closer() -> None:
    """On keys with structure, seeing the rest through its means beats not seeing it."""
    centres = torch.randn(10, 16)
    k = centres.repeat_interleave(64, 0)[None, None] + 0.3 * torch.randn(1, 1, 640, 16)
    v = centres.flip(0).repeat_interleave(64, 0)[None, None] + 0.3 * torch.randn(1, 1, 640, 16)
    q = torch.randn(1, 1, 640, 16)
    exact = Full()(q, k, v).out
    errors = [
        (small(remainder=pool)(q, k, v).out - exact).square().mean() for pool in (None, 64, 8)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_short_inputs_are_dense() -> None:
    q, k, v = torch.randn(3, 1, 2, 500, 8)
    r = MSSwift()(q, k, v)
    torch.testing.assert_close(r.out, Full()(q, k, v).out)
    assert r.stats.mode == "dense"
    assert r.stats.dense_rows == 1.0
    assert r.stats.density == pytest.approx(1.0)


def test_scales_spread_over_heads() -> None:
    assert MSSwift().window_of_head(5) == (512, 128, 2048, 512, 128)
    fixed = MSSwift(scale_of_head=(2, 0))
    assert fixed.window_of_head(2) == (2048, 128)
    with pytest.raises(ConfigError, match="one per KV head"):
        fixed.window_of_head(3)
    with pytest.raises(ConfigError, match="one per KV head"):
        small(scale_of_head=(0, 0))(*torch.randn(3, 1, 3, 200, 8))


def test_antidiagonal_refuses_to_leak() -> None:
    mechanism = small(selector="antidiagonal", block=32)
    q, k, v = torch.randn(3, 1, 2, 200, 8)
    mechanism(q, k, v)
    with pytest.raises(UnsupportedError, match="strict"):
        mechanism(q.requires_grad_(), k, v)
    small(selector="antidiagonal", block=32, causality="shared")(q, k, v).out.sum().backward()


BAD_OPTIONS: list[dict[str, Any]] = [
    {"windows": ()},
    {"windows": (0,)},
    {"windows": (512, 128)},
    {"windows": (64, 64)},
    {"windows": (64.0,)},
    {"windows": 64},
    {"windows": "64"},
    {"windows": (True,)},
    {"overlap": -0.1},
    {"overlap": 1.0},
    {"overlap": "half"},
    {"overlap": float("nan")},
    {"sinks": -1},
    {"sinks": 1.5},
    {"sinks": True},
    {"key_tokens": -1},
    {"key_tokens": None},
    {"coverage": 0.0},
    {"coverage": 1.1},
    {"coverage": "much"},
    {"coverage": float("nan")},
    {"selector": "nearest"},
    {"selector": {"key_block": 8}},
    {"selector": {"name": "bounds", "key_block": 12}},
    {"selector": {"name": "bounds", "key_block": 256}},
    {"selector": {"name": "bounds", "row_group": 0}},
    {"selector": {"name": "bounds", "proposals": 0}},
    {"selector": {"name": "bounds", "tree": 3}},
    {"selector": {"name": "bounds", "tree": 1}},
    {"selector": {"name": "centroids", "tree": 4}},
    {"selector": {"name": "bounds", "tree": 8, "beam": 0}},
    {"selector": {"name": "bounds", "colour": 1}},
    {"selector": {"name": "antidiagonal", "key_block": 4, "stride": 8}},
    {"selector": {"name": "lowrank", "key_block": 12}},
    {"selector": {"name": "lowrank", "rank": 0}},
    {"selector": {"name": "lowrank", "fit": 1.5}},
    {"selector": {"name": "pooled", "variance": 1}},
    {"selector": {"name": "pooled", "proposals": 0}},
    {"selector": {"name": "anchor", "stride": 0}},
    {"selector": 3},
    {"delta": 0},
    {"delta": 48},
    {"delta": True},
    {"delta": 64.0},
    {"remainder": 0},
    {"remainder": -32},
    {"remainder": 33},
    {"remainder": 64.0},
    {"remainder": True},
    {"block": 0},
    {"block": 18},
    {"block": "64"},
    {"scale_of_head": (3,)},
    {"scale_of_head": (-1,)},
    {"scale_of_head": (0.0,)},
    {"scale_of_head": 0},
    {"causality": "loose"},
    {"causality": None},
    {"dense_below": -1},
    {"dense_below": "4k"},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_impossible_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        MSSwift(**options)
    message = str(caught.value)
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message
