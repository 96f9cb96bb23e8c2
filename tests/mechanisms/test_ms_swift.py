"""MS-SWIFT against its naive twin, and its options one by one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import MSSwift
from tests.mechanisms.naive import NaiveSwift

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


def twin(naive: NaiveSwift) -> MSSwift:
    """The mechanism with the options of its twin."""
    options = asdict(naive)
    inner = {name: options.pop(name) for name in ("key_block", "row_group", "proposals")}
    options.pop("causal")
    causality = "strict" if options.pop("strict") else "shared"
    return MSSwift(**options, causality=causality, selector={"name": "bounds", **inner})


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12)
@given(st.data())
def test_naive_twin_agrees(name: str, data: st.DataObject) -> None:
    """The same keys, hence the same output; fp64, where random scores have no ties."""
    causal = data.draw(st.booleans())
    strict = causal and CONFIGS[name].get("coverage") is None and data.draw(st.booleans())
    naive = NaiveSwift(**CONFIGS[name], causal=causal, strict=strict)
    n = data.draw(st.integers(40, 130))
    # A single query is decoding: per-page bounds, tested below.
    q_len = data.draw(st.integers(2, n)) if causal else n
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    q = rng.normal(size=(kv_heads * groups, q_len, 6))
    k, v = rng.normal(size=(2, kv_heads, n, 6)) * data.draw(st.sampled_from([1.0, 3.0]))
    scale = 0.4
    mechanism = twin(naive)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    seen = mechanism.visible(tensors[0], tensors[1], causal=causal, scale=scale)
    np.testing.assert_array_equal(seen[0].numpy(), naive.visible(q, k, scale))
    r = mechanism(*tensors, causal=causal, scale=scale)
    out, lse = naive.attend(q, k, v, scale)
    np.testing.assert_allclose(r.out[0].numpy(), out, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(r.lse[0].numpy(), lse, rtol=1e-8, atol=1e-10)
