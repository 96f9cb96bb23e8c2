"""Overlapping chunks: every token is read, weights sum to one, and merging is the plain sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longswift import ConfigError, InputError
from longswift.extend.chunks import OverlappedChunks

MERGES = ["centre", "linear", "mean"]


@st.composite
def chunkings(draw: st.DrawFn) -> OverlappedChunks:
    chunk = draw(st.integers(1, 20))
    overlap = draw(st.integers(0, chunk - 1))
    return OverlappedChunks(chunk=chunk, overlap=overlap, merge=draw(st.sampled_from(MERGES)))


def encode(x: Tensor) -> Tensor:
    """Depends on every token of the chunk, on its length and on the place in it."""
    return torch.cumsum(x, 1) + x.sum(1, keepdim=True) * torch.linspace(0, 1, x.shape[1])[:, None]


@settings(max_examples=100)
@given(chunkings(), st.integers(0, 80))
def test_plan_and_weights(chunks: OverlappedChunks, length: int) -> None:
    plan, weights = chunks.plan(length), chunks.weights(length)
    total = torch.zeros(length, dtype=torch.float64)
    for i, ((start, end), share) in enumerate(zip(plan, weights, strict=True)):
        assert 0 < end - start <= chunks.chunk or length == 0
        assert (share >= 0).all()
        total[start:end] += share
        if i + 1 < len(plan):
            assert end - start == chunks.chunk
            assert plan[i + 1][0] == end - chunks.overlap
            # A chunk that adds nothing would be wasted.
            assert plan[i + 1][1] > end
    assert plan[0][0] == 0 and plan[-1][1] == length
    torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=60)
@given(chunkings(), st.integers(1, 70))
def test_merging_is_a_weighted_sum(chunks: OverlappedChunks, length: int) -> None:
    x = torch.randn(2, length, 3, requires_grad=True)
    got = chunks(encode, x)
    expected = torch.zeros(2, length, 3)
    for (start, end), share in zip(chunks.plan(length), chunks.weights(length), strict=True):
        part = encode(x[:, start:end]) * share[:, None].float()
        expected = expected + nn.functional.pad(part, (0, 0, start, length - end))
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_cross_fade_by_hand() -> None:
    chunks = OverlappedChunks(chunk=5, overlap=2, merge="linear")
    shares = [w.tolist() for w in chunks.weights(8)]
    assert shares[0] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    assert shares[1] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    centre = OverlappedChunks(chunk=5, overlap=2).weights(8)
    assert [w.tolist() for w in centre] == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("merge", MERGES)
def test_a_chunk_that_holds_everything_is_the_encoder_itself(merge: str) -> None:
    x = torch.randn(2, 9, 4)
    for chunk in (9, 10):
        got = OverlappedChunks(chunk=chunk, overlap=3, merge=merge)(encode, x)
        assert torch.equal(got, encode(x))


@pytest.mark.parametrize("merge", MERGES)
def test_a_token_wise_encoder_is_unchanged(merge: str) -> None:
    """Several inputs, any trailing shape; what each chunk says agrees, so merging keeps it."""
    ids, x = torch.randint(0, 9, (2, 41)), torch.randn(2, 41, 2, 3)

    def embed(ids: Tensor, x: Tensor) -> Tensor:
        return ids[:, :, None, None] + x.square()

    got = OverlappedChunks(chunk=7, overlap=5, merge=merge)(embed, ids, x)
    torch.testing.assert_close(got, embed(ids, x))


def test_choices_keep_their_type() -> None:
    labels = torch.randint(0, 9, (1, 30))
    assert torch.equal(OverlappedChunks(chunk=8, overlap=3)(torch.clone, labels), labels)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(merge: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 30, 4, dtype=dtype)
    got = OverlappedChunks(chunk=8, overlap=3, merge=merge)(lambda y: y * 2, x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, x * 2)


@settings(max_examples=30)
@given(chunkings(), st.data())
def test_padded_rows_are_read_as_their_real_tokens(
    chunks: OverlappedChunks, data: st.DataObject
) -> None:
    x = torch.randn(3, 40, 4)
    left, right = data.draw(st.integers(0, 15)), data.draw(st.integers(0, 15))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :left] = mask[1, 40 - right :] = False
    mask[2, 3:30] = False
    got = chunks(encode, x, key_mask=mask)
    for row in range(3):
        alone = chunks(encode, x[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(got[row, mask[row]], alone)
        assert not got[row, ~mask[row]].any()


def test_what_does_not_fit_is_named() -> None:
    chunks = OverlappedChunks(chunk=4, overlap=1)
    x = torch.randn(2, 9, 3)
    with pytest.raises(InputError, match="same B and L"):
        chunks(encode, x, x[:, :5])
    with pytest.raises(InputError, match="one or more tensors"):
        chunks(encode)
    with pytest.raises(InputError, match="one row per token"):
        chunks(lambda y: y.mean(1, keepdim=True), x)
    with pytest.raises(InputError, match="key_mask"):
        chunks(encode, x, key_mask=torch.ones(2, 9))
    with pytest.raises(InputError, match="key_mask"):
        chunks(encode, x, key_mask=[True])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="padding only"):
        chunks(encode, x, key_mask=torch.zeros(2, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [{"chunk": 0}, {"overlap": 8}, {"overlap": -1}, {"overlap": 1.5}, {"merge": "max"}],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        OverlappedChunks(**{"chunk": 8, "overlap": 2, **options})
