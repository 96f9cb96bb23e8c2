"""Position biases against published formulas and Transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from longswift.core.bias import ScoreBias
from longswift.core.errors import ConfigError, InputError
from longswift.extend.bias import ALiBi, ClippedBias, T5Bias, alibi_slopes


def test_slopes_of_powers_of_two() -> None:
    assert alibi_slopes(1) == (2**-8,)
    assert alibi_slopes(8) == tuple(2.0**-k for k in range(1, 9))
    assert alibi_slopes(16)[:3] == (2**-0.5, 2**-1, 2**-1.5)


def test_slopes_between_powers_of_two() -> None:
    """12 heads: the 8 of eight heads, and the first, third, fifth and seventh of sixteen."""
    between = tuple(2.0 ** (-0.5 * k) for k in (1, 3, 5, 7))
    assert alibi_slopes(12) == alibi_slopes(8) + between


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_bloom(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs[:, 0, 1])


def test_alibi_falls_with_the_distance_to_either_side() -> None:
    offset = torch.tensor([-3, 0, 2])
    values = ALiBi(slopes=(0.5, 0.0)).values(offset, 2)
    assert values.tolist() == [[-1.5, 0.0, -1.0], [0.0, 0.0, 0.0]]
    learned = torch.tensor([0.5, 0.25], requires_grad=True)
    ALiBi(slopes=learned).values(offset, 2).sum().backward()
    assert learned.grad is not None and learned.grad.tolist() == [-5.0, -5.0]


@settings(max_examples=40)
@given(
    bidirectional=st.booleans(),
    half=st.integers(2, 20),
    more=st.integers(1, 300),
    seed=st.booleans(),
)
def test_buckets_are_those_of_t5(bidirectional: bool, half: int, more: int, seed: bool) -> None:
    rows = 2 * half + (seed and not bidirectional)
    exact = (half if bidirectional else rows) // 2
    bias = T5Bias(
        table=torch.zeros(rows, 1), bidirectional=bidirectional, max_distance=exact + more
    )
    offset = torch.arange(-700, 700)
    theirs = T5Attention._relative_position_bucket(
        offset, bidirectional=bidirectional, num_buckets=rows, max_distance=exact + more
    )
    assert torch.equal(bias.buckets(offset), theirs)


def test_clipped_distances() -> None:
    table = torch.arange(10.0).view(5, 2).requires_grad_()
    values = ClippedBias(table=table).values(torch.tensor([-9, -2, -1, 0, 1, 2, 5]), 2)
    assert values[0].tolist() == [0, 0, 2, 4, 6, 8, 8]
    assert values[1].tolist() == [1, 1, 3, 5, 7, 9, 9]
    values.sum().backward()
    assert table.grad is not None and table.grad[:, 0].tolist() == [2, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ALiBi(slopes=0.5), "finite numbers"),  # type: ignore[arg-type]
        (lambda: ALiBi(slopes=(0.5, float("inf"))), "finite numbers"),
        (lambda: ALiBi(slopes=torch.ones(2, 2)), "float tensor"),
        (lambda: ClippedBias(table=torch.ones(4, 2)), "2 c \\+ 1 rows"),
        (lambda: ClippedBias(table=torch.ones(5)), r"\[buckets, Hq\]"),
        (lambda: T5Bias(table=torch.ones(5, 2), bidirectional=True), "even if bidirectional"),
        (lambda: T5Bias(table=torch.ones(32, 2), max_distance=16), "more than the 16 distances"),
        (lambda: T5Bias(table=torch.ones(32, 2).long()), "float tensor"),
        (lambda: alibi_slopes(0), "positive number of heads"),
    ],
)
def test_impossible_biases(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "bias", [ALiBi(slopes=(0.5,) * 3), ClippedBias(table=torch.ones(5, 3))], ids=["alibi", "table"]
)
def test_biases_belong_to_query_heads(bias: Any) -> None:
    with pytest.raises(InputError, match="4 query heads, got 3"):
        bias.scores(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 9, 8))


def test_a_table_with_nan_is_refused() -> None:
    table = torch.zeros(3, 2)
    table[1, 1] = float("nan")
    with pytest.raises(InputError, match="bias"):
        ClippedBias(table=table).scores(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))


def table_of(n: int, heads: int = 2) -> ScoreBias:
    values = torch.randn(heads, 2 * n - 1, dtype=torch.float64)
    return ScoreBias(values=values, zero=n - 1)


def test_rectangles_are_copies() -> None:
    """They are written to, even where the table itself would have the right layout."""
    bias = table_of(9, heads=1)
    before = bias.values.clone()
    for rows, width in ((1, 1), (1, 5), (5, 1)):
        part = bias.rectangle(-2, rows, width)
        assert torch.equal(part, bias.rows(torch.arange(2, 2 + rows), width))
        part.fill_(7.0)
    assert torch.equal(bias.values, before)


def test_rectangles_and_their_gradients() -> None:
    bias = table_of(20)
    whole = bias.rows(torch.arange(20), 20)
    part = bias.rectangle(3 - 7, 5, 9)
    assert torch.equal(part, whole[:, 7:12, 3:12])
    weights = torch.randn_like(part)
    leaf = bias.values.clone().requires_grad_()
    again = ScoreBias(values=leaf, zero=bias.zero).rectangle(3 - 7, 5, 9)
    (expected,) = torch.autograd.grad((again * weights).sum(), leaf)
    found = ScoreBias(values=torch.zeros_like(leaf), zero=bias.zero)
    found.add_rectangle_(3 - 7, weights)
    torch.testing.assert_close(found.values, expected)


def test_maxima_and_means_over_blocks_of_keys() -> None:
    bias, n, size = table_of(24), 24, 4
    whole = bias.rows(torch.arange(n), n)
    position = torch.arange(n)[None]
    blocks = torch.arange(n // size).view(1, 1, 1, -1)
    by_block = whole.unflatten(2, (-1, size))
    for made, expected in (
        (bias.largest(size, size), by_block.amax(3)),
        (bias.mean(size, size), by_block.mean(3)),
    ):
        found = made.at(blocks, position)[0, 0, 0].view(2, n, -1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distance", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 1])
def test_every_third_token(distance: int, start: int) -> None:
    bias = table_of(23)
    whole = bias.rows(torch.arange(23), 23)[:, start::distance, start::distance]
    count = whole.shape[1]
    spaced = bias.spaced(distance)
    assert torch.equal(spaced.rows(torch.arange(count), count), whole)
