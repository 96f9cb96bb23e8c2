"""Chunked linear attention: chunk == recurrent step == quadratic, with any state, mask and grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import elu

from longswift import ConfigError
from longswift.core.states import LinearResult, LinearState
from longswift.kernels import eager, reference

DTYPES = [torch.float32, torch.float64]


def elu1(x: Tensor) -> Tensor:
    return elu(x) + 1


@st.composite
def calls(
    draw: st.DrawFn,
    longest: int = 50,
    dims: tuple[int, ...] = (1, 4),
    v_dims: tuple[int, ...] = (3, 4),
    chunks: tuple[int, ...] = (1, 2, 3, 7, 16, 64),
) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors q, k, v (and a state's s, z), and the options of a call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    k_len = draw(st.integers(1, longest))
    causal = draw(st.booleans())
    most = k_len if causal else longest
    q_len = draw(st.sampled_from([k_len, 1, draw(st.integers(1, most))]))
    dim, v_dim = draw(st.sampled_from(dims)), draw(st.sampled_from(v_dims))
    dtype = draw(st.sampled_from(DTYPES))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        tensor(batch, kv_heads * groups, q_len, dim),
        tensor(batch, kv_heads, k_len, dim),
        tensor(batch, kv_heads, k_len, v_dim),
    ]
    if draw(st.booleans()):
        shape = batch, kv_heads, dim
        tensors += [tensor(*shape, v_dim), tensor(*shape).abs()]
    masked = draw(st.booleans())
    return tensors, {
        "causal": causal,
        "chunk": draw(st.sampled_from(chunks)),
        "own_chunk": draw(st.booleans()) or not causal,
        "normalise": draw(st.booleans()),
        "q_map": elu1,
        "k_map": elu1,
        "key_mask": torch.rand(batch, k_len, generator=generator) < 0.7 if masked else None,
    }


def run(kernel: Any, tensors: list[Tensor], options: dict[str, Any]) -> LinearResult:
    state = LinearState(*tensors[3:]) if len(tensors) > 3 else None
    return kernel.attend_linear(*tensors[:3], state=state, **options)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 5e-5}


def outcome(
    kernel: Any, tensors: list[Tensor], options: dict[str, Any], weights: list[Tensor]
) -> list[Tensor]:
    """Output, normaliser, state, and the gradients of all tensors; fills empty ``weights``."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, normaliser, state = run(kernel, leaves, options)
    parts = [out, normaliser, state.s, state.z]
    weights += [torch.randn_like(x) for x in parts[len(weights) :]]
    loss = sum((x * w).sum() for x, w in zip(parts, weights, strict=True))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*parts, *grads)]


@settings(max_examples=150)
@given(calls())
def test_chunks_are_the_quadratic_form(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    tensors, options = call
    weights: list[Tensor] = []
    results = [outcome(kernel, tensors, options, weights) for kernel in (eager, reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **close(tensors[0].dtype))
    plain = run(eager, tensors, options)
    assert torch.equal(plain.out, results[0][0])


@pytest.mark.parametrize("own_chunk", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_carried_state_continues_the_text(chunk: int, own_chunk: bool) -> None:
    """Cut anywhere (on the grid, where chunks are part of the result) and carry the state."""
    q, k, v = (torch.randn(2, h, 150, 8, dtype=torch.float64) for h in (4, 2, 2))
    options = {"causal": True, "own_chunk": own_chunk, "q_map": elu1, "k_map": elu1}
    whole = eager.attend_linear(q, k, v, chunk=chunk, **options)
    cuts = [0, 64, 128, 150] if not own_chunk else [0, 1, 50, 51, 150]
    state, outs = None, []
    for a, b in zip(cuts, cuts[1:], strict=False):
        part = eager.attend_linear(
            *(x[:, :, a:b] for x in (q, k, v)), chunk=chunk, state=state, **options
        )
        state = part.state
        outs.append(part.out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out)
    assert state is not None
    torch.testing.assert_close(state.s, whole.state.s)
    torch.testing.assert_close(state.z, whole.state.z)


def test_recurrent_steps_are_the_chunks() -> None:
    q, k, v = (elu1(torch.randn(1, h, 40, 6, dtype=torch.float64)) for h in (2, 1, 1))
    s, z = torch.zeros(1, 1, 6, 6, dtype=torch.float64), torch.zeros(1, 1, 6, dtype=torch.float64)
    rows = []
    for i in range(40):
        s = s + k[:, :, i, :, None] * v[:, :, i, None]
        z = z + k[:, :, i]
        rows.append((q[:, :, i : i + 1] @ s) / (q[:, :, i] * z).sum(-1)[:, :, None, None])
    found = eager.attend_linear(q, k, v, causal=True, chunk=16)
    torch.testing.assert_close(found.out, torch.cat(rows, 2))
    torch.testing.assert_close(found.state.s, s)


@pytest.mark.parametrize("own_chunk", [True, False])
def test_gradcheck_into_the_state(own_chunk: bool) -> None:
    shapes = [(1, 2, 11, 3), (1, 1, 11, 3), (1, 1, 11, 2), (1, 1, 3, 2), (1, 1, 3)]
    tensors = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        out, normaliser, state = eager.attend_linear(
            q, k, v, causal=True, chunk=4, own_chunk=own_chunk, state=LinearState(s, z)
        )
        return out, normaliser, state.s, state.z

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_no_key_no_weight_is_zero_with_finite_gradients() -> None:
    """Infini-attention's first segment: an empty memory answers exactly 0."""
    q, k, v = (torch.rand(1, 1, 10, 4, requires_grad=True) for _ in range(3))
    found = eager.attend_linear(q, k, v, causal=True, chunk=8, own_chunk=False)
    assert not found.out[:, :, :8].any() and found.out[:, :, 8:].all()
    grads = torch.autograd.grad(found.out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_neither_stall_nor_overflow(dtype: torch.dtype) -> None:
    """64k tokens of weight above 1: a bf16 sum stalls at 256-fold weight, an fp16 one overflows."""
    k = torch.full((1, 1, 65_536, 2), 0.25, dtype=dtype)
    v = torch.ones(1, 1, 65_536, 2, dtype=dtype)
    found = eager.attend_linear(k[:, :, -1:], k, v, causal=True, q_map=elu1, k_map=elu1)
    assert found.state.z.dtype == torch.float32
    torch.testing.assert_close(found.state.z, torch.full((1, 1, 2), 1.25 * 65_536))
    torch.testing.assert_close(found.out, torch.ones(1, 1, 1, 2))


def test_memory_of_a_training_step_is_linear() -> None:
    """What is kept for the backward pass is a state per run, not per token or chunk."""
    q, k, v = (torch.randn(1, 2, 20_000, 16, requires_grad=True) for _ in range(3))
    found = eager.attend_linear(q, k, v, causal=True, chunk=64, q_map=elu1, k_map=elu1)
    kept = sum(sum(x.numel() for x in state) for _, state in found.out.grad_fn.done)
    assert kept < 0.05 * q.numel()


def test_bidirectional_has_no_own_chunk() -> None:
    x = torch.rand(1, 1, 4, 2)
    with pytest.raises(ConfigError, match="own_chunk"):
        eager.attend_linear(x, x, x, causal=False, own_chunk=False)
