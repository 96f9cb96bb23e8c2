"""Hierarchical attention against its description, with every summary written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import ConfigError, Full
from longswift.core.summary import KeySummary
from longswift.mechanisms.hierarchical import Hierarchical
from tests.mechanisms.drawing import bias_matrix, inputs
from tests.mechanisms.table import Case

ANY = Case(name="hierarchical", label="any")


def summarise(k: Tensor, v: Tensor, pooling: str, scale: float) -> tuple[Tensor, Tensor]:
    """Key and value that stand for ``k [c, D]`` and ``v [c, Dv]``."""
    if pooling == "first":
        return k[0], v[0]
    if pooling == "mean":
        return k.mean(0), v.mean(0)
    weights = (k @ k.mean(0) * scale).softmax(0)
    return weights @ k, weights @ v


def attend_naively(
    mechanism: Hierarchical,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor,
) -> Tensor:
    """Row by row, ``q [Lq, D]``, ``k [Lk, D]``, ``v [Lk, Dv]``, ``bias [Lq, Lk]``."""
    n, size, rows = len(k), mechanism.chunk, []
    for i, query in enumerate(q):
        position = n - len(q) + i
        keys, values, counts, added = [], [], [], []
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            if start <= position < start + size:
                last = position + 1 if causal else part.stop
                keys += list(k[start:last])
                values += list(v[start:last])
                counts += [1] * (last - start)
                added += list(bias[i, start:last])
            elif start < position or not causal:
                key, value = summarise(k[part], v[part], mechanism.pooling, scale)
                keys.append(key)
                values.append(value)
                counts.append(part.stop - start if mechanism.count_weighted else 1)
                of_first = mechanism.pooling == "first"
                added.append(bias[i, start] if of_first else bias[i, part].mean())
        scores = torch.stack(keys) @ query * scale + torch.tensor(counts).log()
        scores = scores + torch.stack(added)
        rows.append(scores.softmax(0) @ torch.stack(values))
    return torch.stack(rows)


CONFIGS = {
    "chunk": st.integers(1, 20),
    "pooling": st.sampled_from(["mean", "first", "attention"]),
    "count_weighted": st.booleans(),
}


@settings(max_examples=30)
@given(st.fixed_dictionaries(CONFIGS), st.data())
def test_description(config: dict[str, Any], data: st.DataObject) -> None:
    mechanism = Hierarchical(**config)
    case = replace(ANY, biased=mechanism.pooling != "attention")
    x = data.draw(inputs(case, masks=("none",), dtypes=(torch.float64,), max_len=40)).with_grad()
    scale = x.q.shape[3] ** -0.5 if x.scale is None else x.scale
    # One head of one row tells; the table compares the others with the oracle.
    got = x.run(mechanism).out[-1, -1]
    bias = bias_matrix(x)[-1, -1]
    of_head = x.q[-1, -1], x.k[-1, -1], x.v[-1, -1]
    expected = attend_naively(mechanism, *of_head, scale, x.causal, bias)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    grads = [torch.autograd.grad((y * weights).sum(), x.leaves) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pooling", ["mean", "first", "attention"])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_equal_tokens_are_full_attention(pooling: str, causal: bool) -> None:
    """Then a summary that counts for its tokens loses nothing."""
    k, v = torch.randn(2, 2, 2, 7, 8, dtype=torch.float64).repeat_interleave(6, 3)[..., :40, :]
    q = torch.randn(2, 4, 40, 8, dtype=torch.float64)
    got = Hierarchical(chunk=6, pooling=pooling)(q, k, v, causal=causal)
    full = Full()(q, k, v, causal=causal)
    torch.testing.assert_close(got.out, full.out)
    torch.testing.assert_close(got.lse, full.lse)


@pytest.mark.parametrize("chunk", [8, 12])
@pytest.mark.parametrize("queries", [1, 9])
def test_summaries_of_a_cache_change_nothing(chunk: int, queries: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 61, 8, dtype=torch.float64)
    q = q[:, :, -queries:]
    summary = KeySummary.build(k, v, 4)
    for pooling in ("mean", "first", "attention"):
        mechanism = Hierarchical(chunk=chunk, pooling=pooling)
        plain, helped = (mechanism(q, k, v, summary=s).out for s in (None, summary))
        torch.testing.assert_close(helped, plain)


def test_statistics_count_summaries() -> None:
    q = torch.randn(1, 1, 10, 8)
    causal = Hierarchical(chunk=4)(q, q, q).stats
    assert causal.keys_per_query == pytest.approx((1 + 2 + 3 + 4 + 2 + 3 + 4 + 5 + 3 + 4) / 10)
    both = Hierarchical(chunk=4)(q, q, q, causal=False).stats
    assert both.keys_per_query == pytest.approx((4 * 6 + 4 * 6 + 2 * 4) / 10)
    assert Hierarchical(chunk=10)(q, q, q).stats.density == 1.0


@pytest.mark.parametrize(
    "options", [{"chunk": 0}, {"pooling": "max"}, {"pooling": None}, {"count_weighted": 1}], ids=str
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected .* got"):
        Hierarchical(**options)  # type: ignore[arg-type]
