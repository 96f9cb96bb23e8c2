"""Exponential features: the quadratic form, any state, any mask, and numbers of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.states import ExponentialResult, ExponentialState
from longswift.kernels import eager, reference

DTYPES = [torch.float32, torch.float64]


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors q, k, v (and a state's mean, log_z), and the options of a call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    k_len = draw(st.integers(1, 40))
    q_len = draw(st.sampled_from([k_len, 1, draw(st.integers(1, k_len))]))
    dim, v_dim = draw(st.sampled_from([1, 4])), draw(st.sampled_from([3, 4]))
    dtype = draw(st.sampled_from(DTYPES))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        tensor(batch, kv_heads * groups, q_len, dim),
        # Up to a spread at which exp() overflows in fp32, and beyond.
        tensor(batch, kv_heads, k_len, dim) * draw(st.sampled_from([1.0, 10.0, 100.0])),
        tensor(batch, kv_heads, k_len, v_dim),
    ]
    if draw(st.booleans()):
        tensors += [tensor(batch, kv_heads, dim, v_dim), 5 * tensor(batch, kv_heads, dim)]
    masked = draw(st.booleans())
    return tensors, {
        "causal": draw(st.booleans()),
        "per_feature": draw(st.booleans()),
        "chunk": draw(st.sampled_from([1, 3, 16, 64])),
        "key_mask": torch.rand(batch, k_len, generator=generator) < 0.7 if masked else None,
    }


def run(kernel: Any, tensors: list[Tensor], options: dict[str, Any]) -> ExponentialResult:
    state = ExponentialState(*tensors[3:]) if len(tensors) > 3 else None
    return kernel.attend_exponential(*tensors[:3], state=state, **options)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 5e-4, "atol": 5e-5}


@settings(max_examples=150)
@given(calls())
def test_chunks_are_the_quadratic_form(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    tensors, options = call
    results = []
    weights: list[Tensor] = []
    for kernel in (eager, reference):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, log_normaliser, state = run(kernel, leaves, options)
        parts = [out, log_normaliser, state.mean, state.log_z]
        weights = weights or [torch.randn_like(x) for x in parts]
        loss = sum(
            (torch.where(x.isfinite(), x, 0.0) * w).sum()
            for x, w in zip(parts, weights, strict=True)
        )
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([*parts, *grads])
    for fast, slow in zip(*results, strict=True):
        # Terms as large as the largest entry may cancel in another one, and an exponent is off by a
        # rounding of its own size.
        limits = close(tensors[0].dtype)
        largest = torch.where(slow.isfinite(), slow, 0.0).detach().abs().max()
        limits["atol"] *= max(1.0, float(largest)) * max(1.0, float(tensors[1].abs().max()) / 30)
        torch.testing.assert_close(fast, slow, **limits)
    assert torch.equal(run(eager, tensors, options).out, results[0][0])


@pytest.mark.parametrize("per_feature", [True, False])
def test_a_carried_state_continues_the_text(per_feature: bool) -> None:
    q, k, v = (torch.randn(2, h, 150, 8, dtype=torch.float64) * 3 for h in (4, 2, 2))
    options = {"causal": True, "per_feature": per_feature, "chunk": 16}
    whole = eager.attend_exponential(q, k, v, **options)
    state, outs = None, []
    for a, b in ((0, 1), (1, 50), (50, 51), (51, 150)):
        part = eager.attend_exponential(*(x[:, :, a:b] for x in (q, k, v)), state=state, **options)
        state = part.state
        outs.append(part.out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out)
    assert state is not None
    torch.testing.assert_close(state.mean, whole.state.mean)
    torch.testing.assert_close(state.log_z, whole.state.log_z)


@pytest.mark.parametrize("per_feature", [True, False])
def test_gradcheck_into_the_state(per_feature: bool) -> None:
    shapes = [(1, 2, 11, 3), (1, 1, 11, 3), (1, 1, 11, 2), (1, 1, 3, 2), (1, 1, 3)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, log_z: Tensor) -> tuple[Tensor, ...]:
        out, log_normaliser, state = eager.attend_exponential(
            q,
            k,
            v,
            causal=True,
            per_feature=per_feature,
            chunk=4,
            state=ExponentialState(mean, log_z),
        )
        return out, log_normaliser * (1 - per_feature), state.mean, state.log_z

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("per_feature", [True, False])
def test_a_huge_future_key_moves_nothing_before_it(per_feature: bool) -> None:
    """Shifting by the maximum over the sequence would leave 0 / 0 in front of such a key."""
    q, k, v = (torch.randn(1, 1, 200, 4) for _ in range(3))
    before = eager.attend_exponential(q, k, v, causal=True, per_feature=per_feature)
    k = k.clone()
    k[:, :, 90:] += 1000.0
    after = eager.attend_exponential(q, k, v, causal=True, per_feature=per_feature)
    torch.testing.assert_close(after.out[:, :, :90], before.out[:, :, :90], rtol=1e-5, atol=1e-6)
    assert after.out.isfinite().all()
