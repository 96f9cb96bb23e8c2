"""A mechanism held to its naive twin."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from longswift import MSSwift
from longswift.extend.bias import ClippedBias
from longswift.mechanisms.selectors import SELECTORS
from tests.mechanisms.naive import NaiveSwift


def twin(naive: NaiveSwift) -> MSSwift:
    """The mechanism with the options of its twin."""
    inner = [f.name for f in fields(SELECTORS.get(naive.selector))]  # type: ignore[arg-type]
    outer = {f.name for f in fields(MSSwift)} & {f.name for f in fields(naive)}
    return MSSwift(
        **{name: getattr(naive, name) for name in outer},
        causality="strict" if naive.strict else "shared",
        selector={"name": naive.selector, **{name: getattr(naive, name) for name in inner}},
    )


def compare(naive: NaiveSwift, data: st.DataObject, fewest: int = 2) -> None:
    """Draw a call of at least ``fewest`` queries and hold the mechanism to its twin.

    The same keys, hence the same output; fp64, where random scores have no ties.
    """
    n = data.draw(st.integers(40, 130))
    q_len = data.draw(st.integers(fewest, n)) if naive.causal else n
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    q = rng.normal(size=(kv_heads * groups, q_len, 6))
    k, v = rng.normal(size=(2, kv_heads, n, 6)) * data.draw(st.sampled_from([1.0, 3.0]))
    scale = 0.4
    mechanism = twin(naive)
    bias = None
    biased = SELECTORS.get(naive.selector).supports_bias and naive.tree is None
    if biased and data.draw(st.booleans()):
        table = 2 * rng.normal(size=(kv_heads * groups, 2 * n - 1))
        # Falling with distance, as biases do, and rough.
        table -= 0.1 * np.abs(np.arange(2 * n - 1) - (n - 1))
        naive = replace(naive, bias=table)
        bias = ClippedBias(table=torch.from_numpy(table.T))
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    options: dict[str, Any] = {"causal": naive.causal, "scale": scale, "bias": bias}
    seen = mechanism.visible(tensors[0], tensors[1], **options)
    np.testing.assert_array_equal(seen[0].numpy(), naive.visible(q, k, scale))
    r = mechanism(*tensors, **options)
    out, lse = naive.attend(q, k, v, scale)
    np.testing.assert_allclose(r.out[0].numpy(), out, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(r.lse[0].numpy(), lse, rtol=1e-8, atol=1e-10)
