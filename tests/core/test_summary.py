"""Page summaries: extremes and sums of complete pages, nothing of incomplete ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift.core.summary import KeySummary, group_sums
from longswift.memory.paged_kv import PagedKV

FIELDS = ("k_min", "k_max", "k_sum", "v_sum")


@settings(max_examples=30)
@given(length=st.integers(0, 60), page=st.sampled_from([1, 4, 16]), seed=st.integers(0, 2**31))
def test_build(length: int, page: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, 3, length, 4, generator=generator)
    summary = KeySummary.build(k, v[..., :2], page)
    assert summary.k_min.shape == (2, 3, length // page, 4)
    assert summary.v_sum.shape == (2, 3, length // page, 2)
    for index in range(length // page):
        keys = k[:, :, index * page : (index + 1) * page]
        values = v[:, :, index * page : (index + 1) * page, :2]
        assert torch.equal(summary.k_min[:, :, index], keys.amin(2))
        assert torch.equal(summary.k_max[:, :, index], keys.amax(2))
        torch.testing.assert_close(summary.k_sum[:, :, index], keys.sum(2))
        torch.testing.assert_close(summary.v_sum[:, :, index], values.sum(2))


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 7, 64, 75])
def test_coarsen_is_a_build_with_longer_pages(factor: int, length: int) -> None:
    k, v = torch.randn(2, 1, 2, length, 4, dtype=torch.float64)
    coarse = KeySummary.build(k, v, 4).coarsen(factor)
    direct = KeySummary.build(k, v, 4 * factor)
    assert coarse.page == direct.page
    for name in FIELDS:
        torch.testing.assert_close(getattr(coarse, name), getattr(direct, name))


def test_rows_selects_aligned_rows_only() -> None:
    k, v = torch.randn(2, 3, 2, 64, 4)
    summary = KeySummary.build(k, v, 16)
    assert summary.rows([0, 2], slice(5, 64)) is None
    part = summary.rows([0, 2], slice(0, 50))
    assert part is not None
    assert part.k_min.shape == (2, 2, 3, 4)
    assert torch.equal(part.k_max, summary.k_max[[0, 2], :, :3])


def test_some_heads_use_the_sums_that_a_cache_remembers() -> None:
    pages = PagedKV()
    pages.append(*torch.randn(2, 1, 5, 200, 4))
    whole = pages.summary()
    assert whole is not None
    k_sum, v_sum = whole.pool_sums(4)
    evenly, others = whole.heads(slice(1, 5, 2)), whole.heads([0, 3, 4])
    for found, right in zip(evenly.pool_sums(4), (k_sum, v_sum), strict=True):
        assert torch.equal(found, right[:, 1::2])
        assert found.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    for found, right in zip(others.heads([2, 0]).pool_sums(4), (k_sum, v_sum), strict=True):
        assert torch.equal(found, right[:, [4, 0]])
    built = KeySummary.build(*torch.randn(2, 1, 5, 200, 4), 16).heads([0, 3])
    torch.testing.assert_close(built.pool_sums(4)[0], built.coarsen(4).k_sum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_fp32(dtype: torch.dtype) -> None:
    k = torch.full((1, 1, 4096, 2), 30.0, dtype=dtype)
    summary = KeySummary.build(k, k, 4096)
    assert summary.k_min.dtype == dtype
    assert summary.k_sum.dtype == torch.float32
    assert summary.k_sum[0, 0, 0, 0] == 4096 * 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_have_gradients(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 37, 8).to(dtype).requires_grad_()
    group_sums(x, 4).sum().backward()
    assert x.grad is not None and x.grad[:, :, :36].eq(1).all() and not x.grad[:, :, 36:].any()
