"""PagedKV equals plain tensors and freshly built summaries after any sequence of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.errors import InputError
from longswift.core.summary import KeySummary
from longswift.memory.paged_kv import PagedKV

OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 60)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("summary"), st.booleans()),
    st.tuples(st.just("starts"), st.lists(st.integers(0, 20), min_size=1, max_size=4)),
    st.tuples(st.just("reset"), st.none()),
)


def _check(pages: PagedKV, k: Tensor, v: Tensor, starts: list[int]) -> None:
    """Keys, values and the pages of every row against ``KeySummary.build`` of the row alone."""
    assert pages.keys is not None and pages.values is not None
    assert torch.equal(pages.keys, k) and torch.equal(pages.values, v)
    summary = pages.summary(starts)
    assert summary is not None and summary.start == tuple(starts)
    for row, start in enumerate(starts):
        count = max(0, k.shape[2] - start) // pages.page
        one = slice(row, row + 1)
        expected = KeySummary.build(k[one, :, start:], v[one, :, start:], pages.page)
        assert torch.equal(summary.k_min[one, :, :count], expected.k_min)
        assert torch.equal(summary.k_max[one, :, :count], expected.k_max)
        torch.testing.assert_close(summary.k_sum[one, :, :count], expected.k_sum)
        torch.testing.assert_close(summary.v_sum[one, :, :count], expected.v_sum)
        if start < k.shape[2]:
            assert summary.rows([row], slice(start, k.shape[2])) is not None
    for end in (k.shape[2] // 2, k.shape[2]):
        until, expected = summary.until(end), pages_until(k, v, starts, end, pages.page)
        head = k.shape[1] - 1
        heads = summary.heads([head]).until(end)
        for row, count in enumerate(max(0, end - start) // pages.page for start in starts):
            for name, right in expected[row].items():
                found = getattr(until, name)[row, :, :count]
                torch.testing.assert_close(found, right)
                assert torch.equal(getattr(heads, name)[row, 0, :count], found[head])
        if len(set(starts)) == 1 and until.k_sum.shape[2] >= 2:
            sums = until.pool_sums(2)[0]
            assert sums.shape[2] == until.k_sum.shape[2] // 2
            torch.testing.assert_close(heads.pool_sums(2)[0], sums[:, [head]])


def pages_until(
    k: Tensor, v: Tensor, starts: list[int], end: int, page: int
) -> list[dict[str, Tensor]]:
    """What every row's summary of its first keys holds."""
    found = []
    for row, start in enumerate(starts):
        own = KeySummary.build(k[row : row + 1, :, start:end], v[row : row + 1, :, start:end], page)
        names = ("k_min", "k_max", "k_sum", "v_sum")
        found.append({name: getattr(own, name)[0] for name in names})
    return found


@settings(max_examples=120)
@given(st.lists(OPERATIONS, min_size=1, max_size=14), st.sampled_from([4, 16]))
def test_any_sequence_of_operations(operations: list[tuple[str, Any]], page: int) -> None:
    pages = PagedKV()
    pages.page = page
    k, v = torch.randn(2, 2, 0, 3), torch.randn(2, 2, 0, 5)
    starts = [0, 0]
    for name, value in operations:
        batch = k.shape[0]
        if name == "append":
            new_k, new_v = torch.randn(batch, 2, value, 3), torch.randn(batch, 2, value, 5)
            k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
            got_k, got_v = pages.append(new_k, new_v)
            assert torch.equal(got_k, k) and torch.equal(got_v, v)
        elif name == "crop":
            k, v = k[:, :, :value], v[:, :, :value]
            pages.crop(value)
        elif name == "select" and pages.keys is not None:
            rows = torch.tensor([row % batch for row in value])
            k, v, starts = k[rows], v[rows], [starts[row] for row in rows.tolist()]
            pages.select(rows)
        elif name == "repeat" and batch * value <= 8 and pages.keys is not None:
            k, v = k.repeat_interleave(value, 0), v.repeat_interleave(value, 0)
            starts = [start for start in starts for _ in range(value)]
            pages.repeat_interleave(value)
        elif name == "starts":
            starts = [value[row % len(value)] for row in range(batch)]
        elif name == "reset":
            k, v = k[:, :, :0], v[:, :, :0]
            pages.reset()
            assert pages.keys is None and pages.summary() is None
        elif name == "summary" and pages.keys is not None:
            _check(pages, k, v, starts)
    if pages.keys is not None:
        _check(pages, k, v, starts)


@torch.no_grad()
def test_decoding_copies_rarely_and_returns_views() -> None:
    pages = PagedKV()
    pages.append(torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8))
    places = set()
    for _ in range(4000):
        k, v = pages.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        places.add(k.data_ptr())
        assert k._base is not None
    assert k.shape == v.shape == (1, 2, 4100, 8)
    assert len(places) < 12
    assert pages.capacity < 2 * 4100


def test_only_new_pages_are_summarised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    build = KeySummary.build.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, k: Tensor, v: Tensor, page: int) -> KeySummary:
        seen.append(k.shape[2])
        return build(cls, k, v, page)

    monkeypatch.setattr(KeySummary, "build", classmethod(counted))
    pages = PagedKV()
    pages.append(torch.randn(2, 1, 100, 4), torch.randn(2, 1, 100, 4))
    pages.summary([0, 0])
    for _ in range(40):
        pages.append(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4))
        pages.summary([0, 0])
    assert seen == [96, 16, 16]


def test_gradients_flow_and_nothing_is_overwritten() -> None:
    pages = PagedKV()
    k, v = torch.randn(1, 1, 5, 2, requires_grad=True), torch.randn(1, 1, 5, 2)
    first, _ = pages.append(k, v)
    loss = (first**2).sum()
    second, _ = pages.append(k, v)
    (loss + (second**2).sum()).backward()
    assert k.grad is not None
    torch.testing.assert_close(k.grad, 6 * k.detach())
    with torch.no_grad():
        third, _ = pages.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert not third.requires_grad and third.shape[2] == 11


def test_room_behind_a_crop_is_not_the_callers() -> None:
    pages, kept = PagedKV(), torch.randn(1, 1, 40, 8)
    k, v = kept.clone(), torch.randn(1, 1, 40, 8)
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    keys, values = pages.append(k, v)
    out = (q @ keys.mT).softmax(-1) @ values
    pages.crop(20)
    with torch.no_grad():
        pages.append(torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 8))
        assert pages.capacity > 25, "the room is used again from here on"
        buffer = pages.buffers[0]
        pages.append(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert torch.equal(k, kept) and pages.buffers[0] is buffer
    out.sum().backward()


def test_inference_mode_and_back() -> None:
    pages = PagedKV()
    with torch.inference_mode():
        pages.append(torch.randn(1, 1, 20, 2), torch.randn(1, 1, 20, 2))
        pages.summary([0])
    with torch.no_grad():
        pages.append(torch.randn(1, 1, 20, 2), torch.randn(1, 1, 20, 2))
    assert pages.keys is not None and pages.values is not None
    _check(pages, pages.keys.clone(), pages.values.clone(), [0])


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 4), (1, 2, 3, 4), (1, 1, 3, 5)], ids=["batch", "heads", "width"]
)
def test_foreign_tensors_are_refused(shape: tuple[int, ...]) -> None:
    pages = PagedKV()
    pages.append(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    with pytest.raises(InputError, match="fresh cache"):
        pages.append(torch.randn(shape), torch.randn(shape))
    with pytest.raises(InputError, match="fresh cache"):
        pages.append(torch.randn(1, 1, 3, 4).double(), torch.randn(1, 1, 3, 4).double())
    with pytest.raises(InputError, match="one per batch row"):
        pages.summary([0, 0])
