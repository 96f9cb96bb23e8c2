"""One answer however the call is cut: by batch row, by padding, by chunk, by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.mechanisms.drawing import Inputs, allowed_pairs, inputs, masked_softmax, tolerance
from tests.mechanisms.table import CASES, Case

case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
causal_of = pytest.mark.parametrize(
    "case", [c for c in CASES if c.causal], ids=lambda case: case.label
)
softmax_of = pytest.mark.parametrize(
    "case", [c for c in CASES if c.softmax], ids=lambda case: case.label
)


def batch_row(x: Inputs, row: int) -> Inputs:
    mask = None if x.key_mask is None else x.key_mask[row : row + 1]
    q, k, v = (t[row : row + 1] for t in x.tensors)
    return replace(x, q=q, k=k, v=v, key_mask=mask)


@case_of
@settings(max_examples=15)
@given(st.data())
def test_batch_equals_single(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case))
    mechanism = case.build()
    together = x.run(mechanism)
    for row in range(x.q.shape[0]):
        alone = batch_row(x, row).run(mechanism)
        torch.testing.assert_close(together.out[row], alone.out[0], **tolerance(x.q.dtype))
        torch.testing.assert_close(together.lse[row], alone.lse[0], **tolerance(x.q.dtype))


@case_of
@settings(max_examples=20)
@given(st.data())
def test_padded_equals_unpadded(case: Case, data: st.DataObject) -> None:
    """A padded row is the row of its real tokens; what stands in the padding does not matter."""
    x = data.draw(inputs(case, masks=("left", "right", "both", "holes", "empty_row")))
    training = data.draw(st.sampled_from(case.trainings))
    mechanism = case.build()
    padded = x.run(mechanism, training=training)
    aligned = x.causal or x.q.shape[2] == x.k.shape[2]
    assert x.key_mask is not None
    for row in range(x.q.shape[0]):
        keys = x.key_mask[row]
        queries = keys.any().expand(x.q.shape[2])
        if aligned:
            queries = keys[x.k.shape[2] - x.q.shape[2] :]
        assert not padded.out[row][:, ~queries].any()
        assert (padded.lse[row][:, ~queries] == float("-inf")).all()
        if not queries.any():
            continue
        alone = replace(
            x,
            q=x.q[row : row + 1, :, queries],
            k=x.k[row : row + 1, :, keys],
            v=x.v[row : row + 1, :, keys],
            key_mask=None,
        ).run(mechanism, training=training)
        close = tolerance(x.q.dtype)
        torch.testing.assert_close(padded.out[row][:, queries], alone.out[0], **close)
        torch.testing.assert_close(padded.lse[row][:, queries], alone.lse[0], **close)


@case_of
def test_an_all_true_mask_is_no_mask(case: Case) -> None:
    heads = case.kv_heads[-1]
    q, k, v = (torch.randn(2, heads, 50, 8) for _ in range(3))
    mechanism = case.build()
    for causal in case.directions:
        masked = mechanism(q, k, v, causal=causal, key_mask=torch.ones(2, 50, dtype=torch.bool))
        assert torch.equal(masked.out, mechanism(q, k, v, causal=causal).out)


def in_chunks(x: Inputs, case: Case, cuts: list[int], training: bool) -> tuple[Tensor, Tensor]:
    """The causal call of ``x``, a chunk of queries at a time, each with the keys so far."""
    mechanism = case.build()
    outs, lses = [], []
    for start, end in zip(cuts, cuts[1:], strict=False):
        part = mechanism(
            x.q[:, :, start:end],
            x.k[:, :, :end],
            x.v[:, :, :end],
            causal=True,
            scale=x.scale,
            key_mask=None if x.key_mask is None else x.key_mask[:, :end],
            training=training,
            bias=x.bias,
        )
        outs.append(part.out)
        lses.append(part.lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


@causal_of
@settings(max_examples=20)
@given(st.data())
def test_chunked_equals_one_shot(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, causal=True, chunked=False, masks=("none",), max_len=120))
    training = data.draw(st.sampled_from(case.trainings))
    n = x.q.shape[2]
    # A last chunk of one token is decoding, where content is chosen per row.
    assume(not case.content or n % case.grid != 1)
    inner = data.draw(st.sets(st.integers(1, max(1, (n - 1) // case.grid)), max_size=4))
    cuts = sorted({0, n, *(i * case.grid for i in inner if i * case.grid < n)})
    assume(not case.content or all(b - a > 1 for a, b in zip(cuts, cuts[1:], strict=False)))
    whole = x.run(case.build(), training=training)
    out, lse = in_chunks(x, case, cuts, training)
    torch.testing.assert_close(out, whole.out, **tolerance(x.q.dtype))
    torch.testing.assert_close(lse, whole.lse, **tolerance(x.q.dtype))


@causal_of
@settings(max_examples=10)
@given(st.data())
def test_left_padded_chunks_equal_one_shot(case: Case, data: st.DataObject) -> None:
    """Blocks lie on a grid counted from the first real token, so chunks follow the padding."""
    x = data.draw(inputs(case, causal=True, chunked=False, masks=("none",), max_len=100))
    pad = data.draw(st.integers(0, 20))
    chunks = data.draw(st.integers(1, 3))
    n = x.q.shape[2]
    cut = pad + chunks * case.grid
    assume(cut < n - 1 and (not case.content or (n - pad) % case.grid != 1) and cut - pad > 1)
    mask = torch.ones(x.q.shape[0], n, dtype=torch.bool)
    mask[:, :pad] = False
    x = replace(x, key_mask=mask)
    whole = x.run(case.build(), training=False)
    out, lse = in_chunks(x, case, [0, cut, n], False)
    torch.testing.assert_close(out, whole.out, **tolerance(x.q.dtype))
    torch.testing.assert_close(lse, whole.lse, **tolerance(x.q.dtype))


@causal_of
@settings(max_examples=15)
@given(st.data())
def test_decode_equals_prefill(case: Case, data: st.DataObject) -> None:
    """Token by token: exact for static patterns, and for chosen ones when the budget covers all."""
    x = data.draw(inputs(case, causal=True, chunked=False, masks=("none", "left"), max_len=70))
    mechanism = case.build(**case.covering) if case.content else case.build()
    whole = x.run(mechanism, training=False)
    for end in {x.k.shape[2], data.draw(st.integers(1, x.k.shape[2]))}:
        step = mechanism(
            x.q[:, :, end - 1 : end],
            x.k[:, :, :end],
            x.v[:, :, :end],
            scale=x.scale,
            key_mask=None if x.key_mask is None else x.key_mask[:, :end],
            training=False,
            bias=x.bias,
        )
        close = tolerance(x.q.dtype)
        torch.testing.assert_close(step.out[:, :, 0], whole.out[:, :, end - 1], **close)
        torch.testing.assert_close(step.lse[:, :, 0], whole.lse[:, :, end - 1], **close)


@softmax_of
@settings(max_examples=20)
@given(st.data())
def test_full_budget_equals_full_attention(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case))
    mechanism = case.build(**case.covering)
    out, lse = masked_softmax(x, allowed_pairs(x))
    for training in case.trainings:
        r = x.run(mechanism, training=training)
        torch.testing.assert_close(r.out.double(), out, **tolerance(x.q.dtype))
        torch.testing.assert_close(r.lse.double(), lse, **tolerance(x.q.dtype))


ONE_SCALE = [c for c in CASES if c.alike and len(c.config.get("windows", ())) <= 1]


@pytest.mark.parametrize("case", ONE_SCALE, ids=lambda case: case.label)
@settings(max_examples=10)
@given(st.data())
def test_the_order_of_heads_does_not_matter(case: Case, data: st.DataObject) -> None:
    """Swapping whole KV heads with their groups swaps the outputs, when heads share a scale."""
    x = data.draw(inputs(case, masks=("none",), biases=("none",)))
    kv_heads = x.k.shape[1]
    groups = x.q.shape[1] // kv_heads
    order = torch.randperm(kv_heads)
    q_order = (order[:, None] * groups + torch.arange(groups)).flatten()
    mechanism = case.build()
    moved = replace(x, q=x.q[:, q_order], k=x.k[:, order], v=x.v[:, order]).run(mechanism)
    torch.testing.assert_close(moved.out, x.run(mechanism).out[:, q_order], **tolerance(x.q.dtype))
