"""Nothing flows back from the future: values never, choices only as far as the mode allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.mechanisms.drawing import Inputs, inputs, tolerance
from tests.mechanisms.table import CASES, Case

CAUSAL = [case for case in CASES if case.causal]
case_of = pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.label)
strict_of = pytest.mark.parametrize(
    "case", [c for c in CAUSAL if c.strict], ids=lambda case: case.label
)
choosing_of = pytest.mark.parametrize(
    "case", [c for c in CAUSAL if c.strict and c.content], ids=lambda case: case.label
)


def changed_from(x: Inputs, token: int) -> Inputs:
    """The same call with everything from key position ``token`` on replaced."""

    def change(t: Tensor, start: int) -> Tensor:
        t = t.clone()
        t[:, :, start:] = torch.randn_like(t[:, :, start:]) * 4
        return t

    first_row = max(0, token - (x.k.shape[2] - x.q.shape[2]))
    return replace(x, q=change(x.q, first_row), k=change(x.k, token), v=change(x.v, token))


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding, which may change with the number of keys in a product."""
    eps = 32 * torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, rtol=eps, atol=eps)


@strict_of
@settings(max_examples=20)
@given(st.data())
def test_strict_mode_never_looks_ahead(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, causal=True))
    k_len, offset = x.k.shape[2], x.k.shape[2] - x.q.shape[2]
    token = data.draw(st.integers(offset, k_len - 1))
    mechanism = case.build()
    y = changed_from(x, token)
    before, after = (call.run(mechanism, training=True) for call in (x, y))
    rows = token - offset
    assert_same(before.out[:, :, :rows], after.out[:, :, :rows])
    assert_same(before.lse[:, :, :rows], after.lse[:, :, :rows])
    seen = [mechanism.visible(c.q, c.k, **c.options, training=True) for c in (x, y)]
    assert torch.equal(seen[0][:, :, :rows], seen[1][:, :, :rows])


@case_of
@settings(max_examples=20)
@given(st.data())
def test_shared_mode_moves_nothing_before_the_block(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, causal=True, masks=("none", "left")))
    k_len, offset = x.k.shape[2], x.k.shape[2] - x.q.shape[2]
    token = data.draw(st.integers(offset, k_len - 1))
    mechanism = case.build()
    before = x.run(mechanism, training=False)
    after = changed_from(x, token).run(mechanism, training=False)
    for row in range(x.q.shape[0]):
        start = 0 if x.key_mask is None else int((~x.key_mask[row]).sum())
        block = start + max(0, token - start) // case.grid * case.grid
        rows = max(0, block - offset)
        assert_same(before.out[row, :, :rows], after.out[row, :, :rows])
        assert_same(before.lse[row, :, :rows], after.lse[row, :, :rows])


@strict_of
@settings(max_examples=15)
@given(st.data())
def test_a_longer_text_does_not_change_its_beginning(case: Case, data: st.DataObject) -> None:
    """Strict mode: what follows may even be missing."""
    x = data.draw(inputs(case, causal=True, chunked=False, masks=("none",)))
    end = data.draw(st.integers(1, x.k.shape[2]))
    # A single query is decoding, where content is chosen from smaller pages.
    assume(end > 1 or not case.content)
    mechanism = case.build()
    whole = x.run(mechanism, training=True)
    q, k, v = (t[:, :, :end] for t in x.tensors)
    part = replace(x, q=q, k=k, v=v).run(mechanism, training=True)
    torch.testing.assert_close(part.out, whole.out[:, :, :end], **tolerance(x.q.dtype))
    torch.testing.assert_close(part.lse, whole.lse[:, :, :end], **tolerance(x.q.dtype))


@choosing_of
def test_training_mode_is_the_default_while_gradients_are_on(case: Case) -> None:
    q, k, v = torch.randn(3, 1, case.kv_heads[0], 90, 8)
    x = Inputs(q=q, k=k, v=v)
    mechanism = case.build()
    recorded = x.with_grad().run(mechanism)
    assert recorded.stats.mode == "strict"
    assert x.run(mechanism).stats.mode == "shared"
    with torch.no_grad():
        assert x.with_grad().run(mechanism).stats.mode == "shared"
    torch.testing.assert_close(recorded.out.detach(), x.run(mechanism, training=True).out)


@case_of
@settings(max_examples=10)
@given(st.data())
def test_gradients_respect_causality(case: Case, data: st.DataObject) -> None:
    """The gradient of row i with respect to keys, values and queries after i is exactly zero."""
    x = data.draw(inputs(case, causal=True, masks=("none",))).with_grad()
    q_len, k_len = x.q.shape[2], x.k.shape[2]
    row = data.draw(st.integers(0, q_len - 1))
    out, lse, _ = x.run(case.build(), training=case.strict)
    d_q, d_k, d_v = torch.autograd.grad(out[:, :, row].sum() + lse[:, :, row].sum(), x.tensors)
    after = row + k_len - q_len + 1
    assert not d_k[:, :, after:].any()
    assert not d_v[:, :, after:].any()
    others = torch.arange(q_len) > row
    if case.own_query:
        others = torch.arange(q_len) != row
    assert not d_q[:, :, others].any()
