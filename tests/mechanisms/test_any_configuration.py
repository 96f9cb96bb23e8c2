"""MS-SWIFT in any configuration that it accepts, however odd, against its oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longswift import MSSwift
from longswift.mechanisms.selectors import SELECTORS
from tests.mechanisms.drawing import inputs, masked_softmax
from tests.mechanisms.table import Case

ANY_HEADS = Case(name="ms_swift", label="any", kv_heads=(1, 2, 3, 5))
CLOSE: dict[str, float] = {"rtol": 1e-8, "atol": 1e-9}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    key_block = draw(st.sampled_from([1, 2, 4, 8, 16]))
    causality = draw(st.sampled_from(["auto", "shared", "strict"]))
    key_tokens = draw(st.sampled_from([0, 1, 5, 16, 33]))
    name = draw(st.sampled_from(["bounds", "bounds", *SELECTORS.names()]))
    selector: dict[str, Any] = {"name": name, "key_block": key_block}
    if name == "antidiagonal":
        selector["stride"] = draw(st.sampled_from([s for s in (1, 2, 8) if key_block % s == 0]))
        causality = "shared"
        # It takes whole blocks.
        key_tokens = key_tokens // key_block * key_block
    elif name == "anchor":
        selector["stride"] = draw(st.sampled_from([1, 3, 8, 100]))
    else:
        selector["proposals"] = draw(st.integers(1, 8))
        selector["most_proposals"] = draw(st.integers(1, 16))
    if name == "bounds":
        selector["row_group"] = draw(st.sampled_from([1, 2, 8, 16]))
        selector["tree"] = draw(st.sampled_from([None, None, 2, 8]))
        selector["beam"] = draw(st.integers(1, 3))
        selector["row_radius"] = draw(st.sampled_from([0.0, 0.5]))
        selector["least_share"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    if name == "lowrank":
        selector["rank"] = draw(st.sampled_from([None, 1, 3, 64]))
        selector["fit"] = draw(st.sampled_from([1, 20, 64, 4096]))
    if name == "pooled":
        selector["variance"] = draw(st.booleans())
    pools = draw(st.sampled_from([None, 1, 3, 4, 40]))
    block = key_block * draw(st.sampled_from([1, 2, 3, 4, 8]))
    return {
        "windows": tuple(sorted(draw(st.sets(st.integers(1, 120), min_size=1, max_size=4)))),
        "overlap": draw(st.sampled_from([0.01, 0.2, 0.5, 0.77, 0.99])),
        "sinks": draw(st.sampled_from([0, 1, 4, 17, 40])),
        "key_tokens": key_tokens,
        "coverage": draw(st.sampled_from([None, 0.01, 0.5, 0.9, 1.0])),
        "selector": selector,
        "remainder": None if pools is None else pools * key_block,
        "block": block,
        "delta": draw(st.sampled_from([None, None, None, key_block, block])),
        "causality": causality,
        "dense_below": draw(st.sampled_from([0, 0, 1, 50])),
    }


@settings(max_examples=120)
@given(configurations(), st.booleans(), st.data())
def test_any_configuration(config: dict[str, Any], training: bool, data: st.DataObject) -> None:
    mechanism = MSSwift(**config)
    selector: Any = mechanism.selector
    deaf = not selector.supports_bias or getattr(selector, "tree", None) is not None
    case = replace(ANY_HEADS, biased=mechanism.key_tokens == 0 or not deaf)
    x = data.draw(inputs(case, dtypes=(torch.float64,), max_len=130))
    results = []
    weights = torch.randn(*x.q.shape[:3], x.v.shape[3], dtype=torch.float64)
    for call in (mechanism, mechanism.reference):
        y = x.with_grad()
        out, lse, _ = call(*y.tensors, **y.options, training=training)
        loss = (out * weights).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, y.leaves)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)
    if mechanism.remainder is None and mechanism.delta is None:
        seen = mechanism.visible(x.q, x.k, **x.options, training=training)
        out, lse = masked_softmax(x, seen)
        torch.testing.assert_close(results[0][0], out, **CLOSE)
        torch.testing.assert_close(results[0][1], lse, **CLOSE)
