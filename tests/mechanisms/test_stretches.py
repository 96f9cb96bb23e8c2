"""Pools of the remainder that double with the position of the queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import MSSwift
from longswift.core.pattern import Band, BlockPattern
from longswift.core.summary import PoolSums
from longswift.core.types import AttentionResult
from longswift.extend.bias import ALiBi
from longswift.kernels import native
from longswift.mechanisms import stretches as growing
from longswift.mechanisms.stretches import MOST_POOLS, pool_size, stretches
from longswift.memory.paged_kv import PagedKV
from tests.mechanisms.naive import NaiveSwift
from tests.mechanisms.twins import compare

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        not native.verify(torch.device("cpu"))[0], reason="nothing is compiled"
    ),
)
SMALL: dict[str, Any] = {
    "windows": (16, 32),
    "sinks": 4,
    "key_tokens": 8,
    "block": 16,
    "selector": {"name": "bounds", "key_block": 4, "row_group": 4},
    "dense_below": 0,
    "remainder": 8,
}
# What tests in short texts make of the number of pools, and where pools of 8 end.
FEW = 16
LIMIT = 8 * FEW


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "MOST_POOLS", FEW)


few_pools = pytest.mark.usefixtures("few")


def small(**options: Any) -> MSSwift:
    return MSSwift(**{**SMALL, **options})


def tensors(
    n: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, heads, n, dim, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, n, dim, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def never_grown(mechanism: MSSwift, *args: Tensor, **options: Any) -> AttentionResult:
    """With pools of one size at every position."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing, "MOST_POOLS", 1 << 40)
        return mechanism(*args, **options)


@given(st.integers(0, 1 << 24), st.integers(1, 300))
def test_the_smallest_pools_of_which_few_lie_before_a_block(position: int, pool: int) -> None:
    size = pool_size(position, pool)
    assert position < MOST_POOLS * size
    assert size == pool or position >= MOST_POOLS * size // 2
    assert size // pool * pool == size
    assert (size // pool).bit_count() == 1


def test_the_default_grows_beyond_128k() -> None:
    pool = MSSwift().remainder
    assert pool is not None
    assert [pool_size(p, pool) for p in (0, 131071, 131072, 262143, 262144, 1048575)] == [
        *(256, 256, 512, 512, 1024, 2048)
    ]


@given(st.integers(1, 9000), st.integers(0, 9000), st.sampled_from([8, 16, 24, 80]), st.booleans())
def test_stretches_share_out_rows_and_blocks(
    q_len: int, before: int, block: int, causal: bool
) -> None:
    if not causal:
        before = 0
    k_len = before + q_len
    first = before // block
    blocks = (k_len - 1) // block - first + 1
    tokens = torch.arange(first, first + blocks).view(1, 1, -1, 1)
    pattern = BlockPattern(
        causal=causal, bands=(Band(tile=block, left=0),), block=block, tokens=tokens, pool=2
    )
    row = 0
    for rows, keys, part in stretches(pattern, q_len, k_len):
        assert rows.start == row < rows.stop
        row = rows.stop
        assert keys == (before + row if causal else k_len)
        assert part.tokens is not None
        mine = part.tokens.flatten().tolist()
        assert mine == list(range((before + rows.start) // block, (before + row - 1) // block + 1))
        for position in (before + rows.start, before + row - 1):
            begins = position // block * block if causal else k_len - 1
            assert part.pool == pool_size(begins, 2)
    assert row == q_len


@settings(max_examples=25)
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from([1, 2, 3]))
def test_naive_twin_agrees(data: st.DataObject, causal: bool, strict: bool, most: int) -> None:
    """Blocks of 16 that do not divide the limits, some of which no block begins between."""
    options: dict[str, Any] = {"windows": (8, 24), "overlap": 0.25, "key_tokens": 6, "sinks": 3}
    strict = strict and causal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing, "MOST_POOLS", most)
        naive = NaiveSwift(**options, remainder=8, most_pools=most, causal=causal, strict=strict)
        compare(naive, data, fewest=1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no key tokens": {"key_tokens": 0},
    "strict": {"causality": "strict"},
    "coverage": {"coverage": 0.5},
    "dense start": {"dense_below": 100},
    "delta": {"delta": 8},
    "guard": {"min_coverage": 0.3},
    "dense head": {"dense_heads": (1,)},
    "budgets": {"key_tokens": (4, 12)},
    "measured": {"collect": True},
    "odd block": {"block": 24, "windows": (24, 48), "delta": 12},
    "centroids": {"selector": {"name": "centroids", "key_block": 4}},
}


@few_pools
@pytest.mark.parametrize("backend", ["eager", NATIVE])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_row_is_as_if_all_pools_were_as_large_as_its_own(
    name: str, biased: bool, backend: str
) -> None:
    """Two limits and three sizes; the choice of keys and what is measured stay as they are."""
    n = 2 * LIMIT + 70
    x = tensors(n, dtype=torch.float32)
    if biased and name == "centroids":
        pytest.skip("takes no bias")
    options: dict[str, Any] = {"backend": backend, "bias": ALiBi() if biased else None}
    mechanism = small(**OPTIONS[name])
    found = mechanism(*x, **options)
    begins = torch.arange(n) // mechanism.block * mechanism.block
    sizes = torch.tensor([pool_size(p, 8) for p in begins.tolist()])
    assert sizes.unique().tolist() == [8, 16, 32]
    for size in (8, 16, 32):
        rows = sizes == size
        apart = never_grown(small(**{**OPTIONS[name], "remainder": size}), *x, **options)
        torch.testing.assert_close(found.out[:, :, rows], apart.out[:, :, rows])
        torch.testing.assert_close(found.lse[:, :, rows], apart.lse[:, :, rows])
        assert (found.stats.captured is None) == (apart.stats.captured is None)
        if found.stats.captured is not None and apart.stats.captured is not None:
            assert found.stats.captured.mean == pytest.approx(apart.stats.captured.mean)


@few_pools
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", NATIVE])
def test_nothing_changes_before_the_limit(backend: str, dtype: torch.dtype) -> None:
    x = tensors(LIMIT, dtype=dtype)
    for causal in (True, False):
        options: dict[str, Any] = {"backend": backend, "causal": causal}
        found, before = small()(*x, **options), never_grown(small(), *x, **options)
        assert torch.equal(found.out, before.out)
        assert torch.equal(found.lse, before.lse)
        assert found.stats == before.stats


@few_pools
def test_bidirectional_queries_have_what_the_last_one_has() -> None:
    x = tensors(LIMIT + 1)
    found = small()(*x, causal=False)
    apart = never_grown(small(remainder=16), *x, causal=False)
    torch.testing.assert_close(found.out, apart.out)
    assert found.stats.keys_per_query == apart.stats.keys_per_query


@few_pools
@pytest.mark.parametrize("backend", ["eager", "reference", NATIVE])
@pytest.mark.parametrize("training", [False, True])
def test_chunks_equal_one_shot(backend: str, training: bool) -> None:
    n = 2 * LIMIT + 100
    x = tensors(n, 2, 1, dtype=torch.float32 if backend == "native" else torch.float64)
    mechanism = small()
    whole = mechanism(*x, backend=backend, training=training)
    cuts = [0, LIMIT - 32, LIMIT, LIMIT + 16, 2 * LIMIT - 16, n]
    for start, end in zip(cuts, cuts[1:], strict=False):
        q, k, v = x[0][:, :, start:end], x[1][:, :, :end], x[2][:, :, :end]
        part = mechanism(q, k, v, backend=backend, training=training)
        torch.testing.assert_close(part.out, whole.out[:, :, start:end])
        torch.testing.assert_close(part.lse, whole.lse[:, :, start:end])


@few_pools
def test_chunks_that_cut_blocks_equal_one_shot_without_a_choice() -> None:
    """Limits of blocks of 24 lie behind those of positions."""
    n = LIMIT + 200
    mechanism = small(key_tokens=0, block=24, windows=(24, 48))
    x = tensors(n)
    whole = mechanism(*x)
    for start, end in [(LIMIT - 3, LIMIT + 3), (LIMIT + 3, LIMIT + 9), (LIMIT + 11, n)]:
        part = mechanism(x[0][:, :, start:end], x[1][:, :, :end], x[2][:, :, :end])
        torch.testing.assert_close(part.out, whole.out[:, :, start:end])


@pytest.mark.parametrize("backend", ["eager", NATIVE])
@pytest.mark.parametrize("block", [16, 48])
def test_decoding_equals_prefill_behind_a_cache(
    backend: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across a limit, and every pool of the cache's pages is summed once."""
    monkeypatch.setattr(growing, "MOST_POOLS", 8)
    n, first = 700, 450
    x = tensors(n, dtype=torch.float32)
    mechanism = small(
        key_tokens=0,
        remainder=64,
        block=block,
        windows=(48,),
        selector={"name": "bounds", "key_block": 16},
    )
    whole = mechanism(*x, backend=backend)
    summed: list[int] = []
    real = PoolSums.of

    def of(self: PoolSums, summary: Any, factor: int) -> tuple[Tensor, Tensor]:
        before = self._known.get(factor)
        found = real(self, summary, factor)
        summed.append(found[0].shape[2] - (0 if before is None else before[0].shape[2]))
        return found

    monkeypatch.setattr(PoolSums, "of", of)
    pages = PagedKV()
    pages.append(x[1][:, :, :first], x[2][:, :, :first])
    for at in range(first, n):
        k, v = pages.append(x[1][:, :, at : at + 1], x[2][:, :, at : at + 1])
        step = mechanism(x[0][:, :, at : at + 1], k, v, summary=pages.summary(), backend=backend)
        torch.testing.assert_close(step.out[:, :, 0], whole.out[:, :, at])
        torch.testing.assert_close(step.lse[:, :, 0], whole.lse[:, :, at])
    # 8 pools of 64 at the latest, then as many tokens in pools of 128.
    assert len(summed) == n - first
    assert sum(summed) <= 9 + n // 128


@few_pools
def test_padding_does_not_move_limits() -> None:
    n, pad = LIMIT + 100, 37
    x = tensors(n)
    mask = torch.ones(1, n + pad, dtype=torch.bool)
    mask[:, :pad] = False
    padded = [torch.cat([torch.randn_like(t[:, :, :pad]), t], 2) for t in x]
    found = small()(*padded, key_mask=mask)
    torch.testing.assert_close(found.out[:, :, pad:], small()(*x).out)


@few_pools
@pytest.mark.parametrize("options", [{}, {"key_tokens": 0}, {"delta": 8}], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_gradients_equal_the_reference(options: dict[str, Any], biased: bool) -> None:
    """Against plain masks over pools of one size, and those of another for the rows that follow."""
    n = LIMIT + 108
    bias = ALiBi() if biased else None
    leaves = [t.requires_grad_() for t in tensors(n, heads=2, kv_heads=1, dim=4)]
    mechanism = small(**options)
    wanted_out, wanted_lse = torch.randn(1, 2, n, 4).double(), torch.randn(1, 2, n).double()

    def gradients(found: AttentionResult, rows: slice) -> list[Tensor]:
        loss = (found.out * wanted_out)[:, :, rows].sum()
        loss = loss + (found.lse * wanted_lse)[:, :, rows].sum()
        return list(torch.autograd.grad(loss, leaves))

    found = gradients(mechanism(*leaves, bias=bias), slice(None))
    fine = never_grown(mechanism, *leaves, bias=bias, backend="reference")
    coarse = small(**{**options, "remainder": 16})
    coarse_found = never_grown(coarse, *leaves, bias=bias, backend="reference")
    before, after = gradients(fine, slice(0, LIMIT)), gradients(coarse_found, slice(LIMIT, None))
    for gradient, a, b in zip(found, before, after, strict=True):
        torch.testing.assert_close(gradient, a + b)


def test_rows_score_few_pools_however_long_the_text() -> None:
    """Windows, sinks and chosen tokens cost the same everywhere."""
    mechanism = small(remainder=4)
    for n in (4 * MOST_POOLS, 8 * MOST_POOLS, 32 * MOST_POOLS):
        x = tensors(n, heads=1, kv_heads=1, dtype=torch.float32)
        last = (x[0][:, :, -64:], *x[1:])
        assert MOST_POOLS / 2 < mechanism(*last).stats.keys_per_query < MOST_POOLS + 50
    assert never_grown(mechanism, *last).stats.keys_per_query > 7 * MOST_POOLS


@few_pools
def test_statistics_count_the_pools_of_every_row() -> None:
    n = 2 * LIMIT + 160
    x = tensors(n, heads=1, kv_heads=1, dtype=torch.float32)
    # What is scored beside the pools is what is scored without any.
    beside = small(remainder=None)(*x).stats.keys_per_query
    exact = small()(*x).stats.dense_rows * n
    band = small().bands(n, 1, causal=True)[0]
    position = torch.arange(n)
    start, _ = band.bounds(position, n)
    sizes = torch.tensor([pool_size(int(p) // 16 * 16, 8) for p in position])
    pools = (start / sizes)[int(exact) :].sum() / n
    assert small()(*x).stats.keys_per_query == pytest.approx(beside + float(pools), rel=1e-6)


@few_pools
@pytest.mark.parametrize("training", [False, True])
def test_flex_attends_stretches(training: bool) -> None:
    """Its parts are merged out of place."""
    n = LIMIT + 40
    leaves = [t.requires_grad_(training) for t in tensors(n, dtype=torch.float32)]
    found = {}
    for backend in ("flex", "eager"):
        r = small()(*leaves, backend=backend)
        assert r.stats.backend == backend
        found[backend] = [r.out.detach(), r.lse.detach()]
        if training:
            found[backend] += torch.autograd.grad(r.out.square().sum() + r.lse.sum(), leaves)
    for fast, slow in zip(*found.values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
