"""Empty rows, low precision, large scores, and calls that leave no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.mechanisms.drawing import Inputs, allowed_pairs, inputs, masked_softmax, tolerance
from tests.mechanisms.table import CASES, Case

case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def plain(case: Case, n: int = 100, dtype: torch.dtype = torch.float32) -> Inputs:
    kv_heads = case.kv_heads[-1]
    q = torch.randn(2, 2 * kv_heads, n, 16, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, n, 16, dtype=dtype) for _ in range(2))
    return Inputs(q=q, k=k, v=v, causal=case.causal)


@case_of
@settings(max_examples=15)
@given(st.data())
def test_empty_rows_are_zero_with_finite_gradients(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, masks=("empty_row", "left", "holes"))).with_grad()
    out, lse, _ = x.run(case.build(), training=case.strict)
    empty = ~allowed_pairs(x).any(-1)
    assert not out[empty].any()
    assert (lse[empty] == float("-inf")).all()
    if case.vanishing:
        empty = lse == float("-inf")
    assert lse[~empty].isfinite().all()
    grads = torch.autograd.grad(out.square().sum() + lse[~empty].sum(), x.leaves)
    assert all(g.isfinite().all() for g in grads)
    if x.key_mask is not None:
        padded = ~x.key_mask[:, None, :, None]
        assert not (grads[1] * padded).any()
        assert not (grads[2] * padded).any()


def textbook(x: Inputs, seen: Tensor) -> Tensor:
    """Attention as it is usually written, in the dtype of its input."""
    groups = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (x.k, x.v))
    scores = x.q @ k.transpose(-1, -2) * x.q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    ("case", "everything"),
    [(c, True) for c in CASES if c.softmax] + [(c, False) for c in CASES if c.subset],
    ids=lambda value: getattr(value, "label", "all" if value else "chosen"),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_low_precision_is_as_good_as_plain(
    case: Case, dtype: torch.dtype, factor: float, everything: bool
) -> None:
    """At most twice the error of textbook attention in the same dtype over the same keys."""
    x = plain(case).to(dtype)
    x = replace(x, k=x.k * factor)
    mechanism = case.build(**case.covering) if everything else case.build()
    r = x.run(mechanism)
    assert r.out.dtype == dtype
    assert r.lse.dtype == torch.float32
    seen = mechanism.visible(x.q, x.k)
    exact, exact_lse = masked_softmax(x, seen)

    def error(y: Tensor) -> float:
        return (y.double() - exact).square().mean().sqrt().item()

    assert error(r.out) <= 2 * error(textbook(x, seen))
    torch.testing.assert_close(r.lse.double(), exact_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", [c for c in CASES if not c.softmax], ids=lambda case: case.label)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_the_rounded_specification(case: Case, dtype: torch.dtype) -> None:
    """Features, sums and states are fp32: only inputs and output are rounded."""
    x = plain(case).to(dtype)
    r = x.run(case.build())
    exact = case.build().reference(*x.to(torch.float64).tensors, **x.options)
    assert r.out.dtype == dtype
    assert r.lse.dtype == torch.float32
    error = (r.out.double() - exact.out).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * exact.out.square().mean().sqrt()
    torch.testing.assert_close(r.lse.double(), exact.lse, rtol=1e-4, atol=1e-4)


@case_of
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients(case: Case, dtype: torch.dtype) -> None:
    """The same choice of keys in fp64 judges the gradients of the low-precision call."""
    x = plain(case, n=60)
    mechanism = case.build(**case.covering)
    weights = torch.randn(x.q.shape)
    grads = []
    for kind in (torch.float64, dtype):
        y = x.to(dtype).to(kind).with_grad()
        out = y.run(mechanism).out
        grads.append(torch.autograd.grad((out * weights.to(kind)).sum(), y.tensors))
    for exact, low in zip(*grads, strict=True):
        assert low.dtype == dtype
        scale = exact.square().mean().sqrt()
        error = (low.double() - exact).square().mean().sqrt()
        assert error <= 4 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    ("case", "causal"),
    [(case, causal) for case in CASES for causal in case.directions],
    ids=lambda value: getattr(value, "label", value),
)
@pytest.mark.parametrize("training", [True, False])
def test_large_scores_stay_finite(case: Case, causal: bool, training: bool) -> None:
    x = plain(case)
    x = replace(x, q=x.q * 50, k=x.k * 50, causal=causal)
    training = training and case.strict
    mechanism = case.build()
    y = x.with_grad()
    # Near ties of huge scores are chosen among by rounding, which backends do differently.
    out, lse, _ = y.run(mechanism, training=training, backend="eager")
    grads = torch.autograd.grad(out.sum() + lse.sum(), y.tensors)
    for t in (out, lse, *grads):
        assert t.isfinite().all()
    slow = mechanism.reference(*x.tensors, causal=causal, training=training)
    torch.testing.assert_close(out.detach(), slow.out, rtol=1e-2, atol=1e-2)


@case_of
def test_constant_keys_and_ties(case: Case) -> None:
    """Every score equal: the mean of what is seen, no NaN, the same for every batch row."""
    x = plain(case)
    x = replace(x, k=torch.ones_like(x.k), v=x.v[:1].expand_as(x.v).contiguous())
    x = replace(x, q=x.q[:1].expand_as(x.q).contiguous())
    r = x.run(case.build())
    assert r.out.isfinite().all()
    torch.testing.assert_close(r.out[0], r.out[1])


@case_of
@pytest.mark.parametrize("training", [True, False])
def test_calls_are_deterministic_and_leave_no_trace(case: Case, training: bool) -> None:
    training = training and case.strict
    x = plain(case)
    copies = [t.clone() for t in x.tensors]
    state = torch.random.get_rng_state()
    mechanism = case.build()
    results = []
    for _ in range(2):
        y = x.with_grad()
        r = y.run(mechanism, training=training)
        results.append((r.out, r.lse, *torch.autograd.grad(r.out.sum(), y.tensors)))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        x.run(mechanism)
    for t, copy in zip(x.tensors, copies, strict=True):
        assert torch.equal(t, copy)


@case_of
def test_any_memory_layout(case: Case) -> None:
    """Transposed, expanded, sliced and negative-offset views give the answer of their copies."""
    kv_heads = case.kv_heads[-1]
    base = torch.randn(2, 61, 3 * kv_heads, 24)
    q = base[:, :, :kv_heads, 3:19].transpose(1, 2)
    k = base[:, :, kv_heads : 2 * kv_heads, 5:21].transpose(1, 2)
    v = base[:1, :, 2 * kv_heads :, 8:].transpose(1, 2).expand(2, -1, -1, -1)
    strided = torch.randn(2, kv_heads, 16, 61).transpose(2, 3)
    mechanism = case.build()
    for k_view in (k, strided):
        for training in case.trainings:
            options = {"causal": case.causal, "training": training}
            r = mechanism(q, k_view, v, **options)
            copies = [t.clone(memory_format=torch.contiguous_format) for t in (q, k_view, v)]
            expected = mechanism(*copies, **options)
            torch.testing.assert_close(r.out, expected.out, **tolerance(torch.float32))
            torch.testing.assert_close(r.lse, expected.lse, **tolerance(torch.float32))


@case_of
def test_inference_mode_and_autocast(case: Case) -> None:
    x = plain(case)
    mechanism = case.build()
    plainly = x.run(mechanism)
    with torch.inference_mode():
        assert torch.equal(x.run(mechanism).out, plainly.out)
    rounded = x.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # As with PyTorch's own attention; but for that, autocast changes nothing.
        inside, below = x.run(mechanism), rounded.run(mechanism)
    assert torch.equal(inside.out, below.out) and inside.out.dtype == torch.bfloat16
    assert torch.equal(below.out, rounded.run(mechanism).out)
    precise = x.to(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert precise.run(mechanism).out.dtype == torch.float64
