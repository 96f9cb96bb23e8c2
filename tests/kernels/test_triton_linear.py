"""Linear attention by Triton kernels, in the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longswift import ConfigError, UnsupportedError, get_mechanism
from longswift.core.states import LinearState
from longswift.kernels import eager, reference, triton
from tests.kernels.test_linear import calls, close, elu1, outcome

pytest.importorskip("triton", reason="triton is not installed")
from longswift.kernels.triton import sums  # noqa: E402

RUNS, WHY = triton.verify(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
if not RUNS:
    pytest.skip(WHY, allow_module_level=True)

TILES = {name: getattr(sums, name) for name in ("_LINES", "_KEYS", "_TALL", "_WIDE")}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of lines, keys and channels on few tokens."""
    for name in TILES:
        monkeypatch.setattr(sums, name, 16)
    monkeypatch.setattr(sums, "_SCANNED", 256)


@settings(max_examples=20)
@given(calls(longest=36, chunks=(5, 16, 64)))
def test_chunks_are_the_quadratic_form(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    """Output, normaliser, state and the gradients of q, k, v and the state."""
    tensors, options = call
    weights: list[Tensor] = []
    results = [outcome(kernel, tensors, options, weights) for kernel in (triton, reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **close(tensors[0].dtype))


@pytest.mark.parametrize("own_chunk", [True, False])
def test_many_chunks_and_tiles(own_chunk: bool) -> None:
    """Tiles that read sums from the middle, from either end."""
    tensors = [torch.rand(1, 1, n, 4, dtype=torch.float64) for n in (57, 70, 70)]
    options = {"causal": True, "chunk": 8, "own_chunk": own_chunk}
    weights: list[Tensor] = []
    results = [outcome(kernel, tensors, options, weights) for kernel in (triton, reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_full_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that GPUs get, several in every direction, a group that is no power of two."""
    for name, size in TILES.items():
        monkeypatch.setattr(sums, name, size)
    shapes = (1, 3, 20, 34), (1, 1, 40, 34), (1, 1, 40, 66), (1, 1, 34, 66), (1, 1, 34)
    tensors = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    options = {"causal": True, "chunk": 24, "q_map": elu1, "k_map": elu1}
    weights: list[Tensor] = []
    results = [outcome(kernel, tensors, options, weights) for kernel in (triton, reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("own_chunk", [True, False])
def test_a_carried_state_continues_the_text(own_chunk: bool) -> None:
    """Cut anywhere (on the grid, where chunks are part of the result) and carry the state."""
    q, k, v = (torch.randn(1, h, 50, 4, dtype=torch.float64) for h in (2, 1, 1))
    options = {"causal": True, "own_chunk": own_chunk, "q_map": elu1, "k_map": elu1, "chunk": 8}
    whole = triton.attend_linear(q, k, v, **options)
    cuts = [0, 1, 18, 50] if own_chunk else [0, 16, 40, 50]
    state, outs = None, []
    for a, b in zip(cuts, cuts[1:], strict=False):
        part = triton.attend_linear(*(x[:, :, a:b] for x in (q, k, v)), state=state, **options)
        state = part.state
        outs.append(part.out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out)
    torch.testing.assert_close(state, whole.state)


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_recurrent_steps_are_the_chunks(chunk: int) -> None:
    q, k, v = (elu1(torch.randn(1, h, 20, 6, dtype=torch.float64)) for h in (2, 1, 1))
    state = LinearState(torch.rand(1, 1, 6, 6).double(), torch.rand(1, 1, 6).double())
    s, z = state
    rows = []
    for i in range(20):
        s = s + k[:, :, i, :, None] * v[:, :, i, None]
        z = z + k[:, :, i]
        rows.append((q[:, :, i : i + 1] @ s) / (q[:, :, i] * z).sum(-1)[:, :, None, None])
    found = triton.attend_linear(q, k, v, causal=True, chunk=chunk, state=state)
    torch.testing.assert_close(found.out, torch.cat(rows, 2))
    torch.testing.assert_close(found.state, LinearState(s, z))
    q.requires_grad_()
    tracked = triton.attend_linear(q, k, v, causal=True, chunk=chunk, state=state)
    assert torch.equal(tracked.out, found.out) and torch.equal(tracked.state.s, found.state.s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """At most twice as wrong as the eager kernel on the same rounded inputs; sums are fp32."""
    exact = [torch.randn(1, h, 33, 8).to(dtype).double() for h in (2, 1, 1)]
    options = {"causal": True, "chunk": 16, "q_map": elu1, "k_map": elu1}
    weights: list[Tensor] = []
    right = outcome(reference, exact, options, weights)
    rounded, given_weights = [x.to(dtype) for x in exact], [w.float() for w in weights]
    results = [outcome(kernel, rounded, options, given_weights) for kernel in (triton, eager)]
    for fast, slow, expected in zip(*results, right, strict=True):
        assert fast.dtype == slow.dtype
        wrong, usual = ((x - expected).abs().max() for x in (fast, slow))
        assert wrong <= 2 * usual + 1e-6 * expected.abs().max()


def test_views_without_maps() -> None:
    """q, k, v are features, as views whose channels are not neighbours in memory."""
    q, k, v = (torch.rand(1, 4, 20, h, dtype=torch.float64).transpose(1, 3) for h in (2, 1, 1))
    weights: list[Tensor] = []
    options = {"causal": True, "chunk": 8}
    results = [outcome(kernel, [q, k, v], options, weights) for kernel in (triton, reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_no_key_no_weight_is_zero_with_finite_gradients() -> None:
    """Infini-attention's first segment: an empty memory answers exactly 0."""
    q, k, v = (torch.rand(1, 1, 10, 4, requires_grad=True) for _ in range(3))
    found = triton.attend_linear(q, k, v, causal=True, chunk=8, own_chunk=False)
    assert not found.out[:, :, :8].any() and found.out[:, :, 8:].all()
    grads = torch.autograd.grad(found.out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    # The chunk that is not complete is seen by nobody.
    assert not grads[1][:, :, 8:].any() and not grads[2][:, :, 8:].any()


def test_the_gradient_is_the_same_every_time() -> None:
    tensors = [torch.rand(1, h, 20, 4, requires_grad=True) for h in (2, 1, 1)]
    once, twice = (
        torch.autograd.grad(
            triton.attend_linear(*tensors, causal=True, chunk=16).out.sum(), tensors
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_mechanisms() -> None:
    """Calls and steps of a mechanism; what has no kernel is refused."""
    linear = get_mechanism("linear", chunk=16)
    q, k, v = (torch.randn(1, h, 20, 8) for h in (4, 2, 2))
    fast, slow = (linear(q, k, v, causal=True, backend=b) for b in ("triton", "eager"))
    assert fast.stats.backend == "triton"
    torch.testing.assert_close(fast.out, slow.out)
    torch.testing.assert_close(fast.lse, slow.lse)
    mask = torch.arange(20).unsqueeze(0) > 4
    fast_step, slow_step = (
        linear.step(q, k, v, key_mask=mask, backend=b) for b in ("triton", "eager")
    )
    torch.testing.assert_close(fast_step.out, slow_step.out)
    torch.testing.assert_close(fast_step.state, slow_step.state)
    with pytest.raises(UnsupportedError, match=r"attend_exponential \(eager, reference\)"):
        get_mechanism("performer", features=8)(q, k, v, causal=True, backend="triton")


def test_what_it_cannot_do_is_refused() -> None:
    x = torch.rand(1, 1, 4, 2)
    with pytest.raises(ConfigError, match="own_chunk"):
        triton.attend_linear(x, x, x, causal=False, own_chunk=False)
    with pytest.raises(UnsupportedError, match="fp64"):
        triton.attend_linear(*[x.double().to("meta")] * 3, causal=True)
