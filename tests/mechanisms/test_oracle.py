"""The fast path against the dense specification: output, log-sum-exp and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.mechanism import Mechanism
from longswift.extend.bias import ClippedBias
from tests.mechanisms.drawing import Inputs, inputs, tolerance
from tests.mechanisms.table import CASES, Case

case_of = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def loss_and_grads(
    mechanism: Mechanism, x: Inputs, weights: tuple[Tensor, Tensor], *, oracle: bool, training: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and the gradients of a random weighting of both."""
    x = x.with_grad()
    call = mechanism.reference if oracle else mechanism
    out, lse, _ = call(*x.tensors, **x.options, training=training)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out * weights[0]).sum() + (finite * weights[1]).sum()
    grads = torch.autograd.grad(loss, x.leaves)
    return out.detach(), lse.detach(), list(grads)


@case_of
@settings(max_examples=25)
@given(st.data())
def test_forward_and_gradients(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case))
    training = data.draw(st.sampled_from(case.trainings))
    out_shape = (*x.q.shape[:3], x.v.shape[-1])
    weights = torch.randn(out_shape, dtype=x.q.dtype), torch.randn(out_shape[:3], dtype=x.q.dtype)
    mechanism = case.build()
    fast = loss_and_grads(mechanism, x, weights, oracle=False, training=training)
    slow = loss_and_grads(mechanism, x, weights, oracle=True, training=training)
    close = tolerance(x.q.dtype)
    torch.testing.assert_close(fast[0], slow[0], **close)
    torch.testing.assert_close(fast[1], slow[1], **close)
    names = ("q", "k", "v", "bias")[: len(fast[2])]
    for name, a, b in zip(names, fast[2], slow[2], strict=True):
        if name == "bias":
            # A sum over all pairs, whose terms cancel.
            close["atol"] *= max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, **close, msg=lambda m, n=name: f"gradient of {n}: {m}")


@case_of
@settings(max_examples=15)
@given(st.data())
def test_forward_without_gradients(case: Case, data: st.DataObject) -> None:
    x = data.draw(inputs(case, max_len=200))
    training = data.draw(st.sampled_from(case.trainings))
    mechanism = case.build()
    with torch.no_grad():
        fast = x.run(mechanism, training=training)
        slow = mechanism.reference(*x.tensors, **x.options, training=training)
        explicit = x.run(mechanism, training=training, backend=fast.stats.backend)
        eager = x.run(mechanism, training=training, backend="eager")
    close = tolerance(x.q.dtype)
    torch.testing.assert_close(fast.lse, slow.lse, **close)
    # Sums that nothing normalises are as large as they are long.
    close["atol"] *= max(1.0, float(slow.out.abs().amax()))
    torch.testing.assert_close(fast.out, slow.out, **close)
    assert torch.equal(explicit.out, fast.out)
    torch.testing.assert_close(eager.out, slow.out, **close)
    assert fast.out.dtype == x.q.dtype
    assert fast.lse.dtype == (torch.float64 if x.q.dtype == torch.float64 else torch.float32)
    assert fast.out.shape == (*x.q.shape[:3], x.v.shape[-1])
    assert fast.lse.shape == x.q.shape[:3]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("case", "causal"),
    [(case, causal) for case in CASES for causal in case.directions],
    ids=lambda value: getattr(value, "label", value),
)
def test_gradcheck(case: Case, causal: bool, biased: bool) -> None:
    if biased and not case.biased:
        pytest.skip("refuses biases, tested in test_bias")
    kv_heads = case.kv_heads[0]
    n = 2 * case.grid + 3 if case.grid > 1 else 11
    q = torch.randn(1, 2 * kv_heads, n, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, kv_heads, n, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, kv_heads, n, 2, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 2 * kv_heads, dtype=torch.float64, requires_grad=True)
    mechanism = case.build()

    def call(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        bias = ClippedBias(table=table[0]) if table else None
        out, lse, _ = mechanism(q, k, v, causal=causal, training=case.strict, bias=bias)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    leaves = (q, k, v, table) if biased else (q, k, v)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
