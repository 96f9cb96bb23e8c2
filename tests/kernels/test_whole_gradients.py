"""Gradients of full attention through torch's fused kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, MSSwift, UnsupportedError
from longswift.core.mechanism import Mechanism
from longswift.core.types import AttentionResult, Partial
from longswift.kernels import eager, native, reference
from longswift.kernels.eager import whole
from longswift.mechanisms import get_mechanism
from longswift.mechanisms.patterned import full_pattern
from tests.kernels import test_whole
from tests.kernels.test_whole import Inputs

CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5}
BACKENDS = [eager]
if native.verify(torch.device("cpu"))[0]:
    BACKENDS.append(native)


def made(
    q_len: int,
    k_len: int,
    *,
    width: int = 16,
    value_width: int = 16,
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> Inputs:
    widths = {"width": width, "value_width": value_width}
    found = test_whole.made(q_len, k_len, seed=q_len + k_len, **widths, **shape)
    q, k, v = (x.to(dtype).requires_grad_() for x in found)
    return q, k, v


def loss(found: Partial | AttentionResult, of: str) -> Tensor:
    """A sum that weighs every element differently, of the output, the log-sum-exp or both."""
    parts = []
    for name, x in (("out", found.out), ("lse", found.lse)):
        if name in of:
            weights = torch.linspace(-1.0, 1.5, x.numel(), dtype=torch.float64).view(x.shape)
            parts.append((weights.to(x.dtype) * x).double().sum())
    return torch.stack(parts).sum()


def doubled(inputs: Inputs) -> Inputs:
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    return q, k, v


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the fused kernel's gradients."""
    calls: list[Any] = []
    real = whole.gradients

    def gradients(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(whole, "gradients", gradients)
    return calls


@settings(max_examples=120)
@given(st.data())
def test_output_and_every_gradient(data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    k_len = data.draw(st.integers(1, 300))
    q_len = data.draw(st.integers(1, k_len if causal else 300))
    dtype = data.draw(st.sampled_from(list(CLOSE)))
    of = data.draw(st.sampled_from(["out", "lse", "out and lse"]))
    backend = data.draw(st.sampled_from(BACKENDS))
    inputs = made(
        q_len,
        k_len,
        batch=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, 3)),
        groups=data.draw(st.integers(1, 3)),
        width=data.draw(st.sampled_from([16, 48])),
        value_width=data.draw(st.sampled_from([16, 32, 48])),
        layout=data.draw(st.sampled_from(["dense", "by token"])),
        dtype=dtype,
    )
    scale = data.draw(st.sampled_from([0.05, 0.25]))
    if backend is native and dtype == torch.float64:
        backend = eager
    pattern = full_pattern(k_len, inputs[1].shape[1], causal, q_len=q_len)
    assert whole.takes(pattern, inputs[0], inputs[1], scale)
    found = backend.attend(*inputs, pattern, scale)
    exact = doubled(inputs)
    right = reference.attend(*exact, pattern, scale)
    grads = torch.autograd.grad(loss(found, of), inputs, allow_unused=of == "lse")
    expected = torch.autograd.grad(loss(right, of), exact, allow_unused=of == "lse")
    limit = CLOSE[dtype]
    for ours, theirs in zip((*found, *grads), (*right, *expected), strict=True):
        theirs = torch.zeros_like(exact[2]) if theirs is None else theirs
        assert ours.dtype == dtype
        size = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=limit * size)


@pytest.mark.parametrize("mechanism", [MSSwift(), Full()], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_training_goes_through_it(
    mechanism: Mechanism, dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    inputs = made(90, 90, groups=2, dtype=dtype)
    found = mechanism(*inputs, causal=causal, backend="eager")
    grads = torch.autograd.grad(found.out.square().sum() + found.lse.sum(), inputs)
    assert len(calls) == 1 and found.stats.mode == "dense"
    right = mechanism.reference(*inputs, causal=causal)
    expected = torch.autograd.grad(right.out.square().sum() + right.lse.sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_leading_rows_of_a_sparse_call_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    mechanism = MSSwift(windows=(32,), block=16, dense_below=64, key_tokens=16, sinks=4)
    inputs = made(300, 300)
    found = mechanism(*inputs, backend="eager")
    grads = torch.autograd.grad(found.out.square().sum(), inputs)
    assert [args[0].shape[2] for args in calls] == [64]
    right = mechanism.reference(*inputs)
    expected = torch.autograd.grad(right.out.square().sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_16_bit_sums_lose_less_than_those_of_torch(
    dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut along the rows and added up in fp32."""
    monkeypatch.setattr(whole, "_ROWS", 768)
    inputs = made(3840, 3840, heads=1, groups=2, width=64, value_width=64, dtype=dtype)
    found = eager.attend(*inputs, full_pattern(3840, 1, causal), 0.25)
    grads = torch.autograd.grad(loss(found, "out"), inputs)

    def by_torch(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = inputs
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.25)
        return torch.autograd.grad(loss(Partial(out, out[..., 0]), "out"), inputs)

    plain, exact = by_torch(inputs), by_torch(doubled(inputs))
    for ours, theirs, true, share in zip(grads, plain, exact, (1.1, 0.7, 0.7), strict=True):
        errors = [float((x.double() - true).norm()) for x in (ours, theirs)]
        assert ours.dtype == dtype and errors[0] <= share * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_gradient_of_the_log_sum_exp_fits(dtype: torch.dtype) -> None:
    inputs = made(80, 100, dtype=dtype)
    pattern = full_pattern(100, 2, True)
    grads = torch.autograd.grad(2e5 * eager.attend(*inputs, pattern, 0.1).lse.mean(), inputs)
    exact = doubled(inputs)
    lse = reference.attend(*exact, pattern, 0.1).lse
    expected = torch.autograd.grad(2e5 * lse.mean(), exact[:2])
    for ours, theirs in zip(grads[:2], expected, strict=True):
        off = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert off <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_it_does_not_take_are_left_to_blocks(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    inputs = made(60, 80, dtype=torch.float64)
    grads, expected = (
        torch.autograd.grad(loss(Full()(*inputs, scale=scale, backend=name), "out"), inputs)
        for name in ("auto", "reference")
    )
    assert not calls
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_under_autocast_gradients_are_the_same() -> None:
    inputs = tuple(x.detach().bfloat16().requires_grad_() for x in made(90, 90))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = MSSwift()(*inputs)
            results.append(torch.autograd.grad(found.out.sum() + found.lse.sum(), inputs))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_some_inputs_may_need_no_gradient() -> None:
    q, k, v = made(70, 70)
    alone = torch.autograd.grad(MSSwift()(q.detach(), k, v.detach()).out.sum(), k)[0]
    every = torch.autograd.grad(MSSwift()(q, k, v).out.sum(), (q, k, v))
    assert torch.equal(alone, every[1])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 16), (1, 1, 70, 1), (1, 2, 1, 1)])
def test_gradients_may_come_expanded(shape: tuple[int, ...]) -> None:
    inputs = made(70, 70)
    given = torch.linspace(0.5, 2.0, 2 * 70 * 16)[: torch.Size(shape).numel()].view(shape)
    given = given.expand(1, 2, 70, 16)
    expanded, dense = (
        torch.autograd.grad(MSSwift()(*inputs).out, inputs, x) for x in (given, given.clone())
    )
    for found, right in zip(expanded, dense, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["full", "sliding_window", "ms_swift", "hierarchical", "linear", "efficient", "performer"],
)
def test_second_derivatives_are_refused_and_never_0(name: str) -> None:
    mechanism = get_mechanism(name)
    q, k, v = (x.detach() for x in made(70, 70))

    def loss(x: Tensor, power: int = 2, backend: str = "auto") -> Tensor:
        return mechanism(x, k, v, backend=backend).out.pow(power).sum()

    def penalty(power: int, backend: str, *, by_call: bool) -> Tensor:
        scale = torch.ones(q.shape[-1], requires_grad=True)
        x = q.clone().requires_grad_()
        found = loss(x * scale, power, backend)
        (grad,) = torch.autograd.grad(found, x, create_graph=True)
        whole = found + grad.square().sum()
        if by_call:
            return torch.autograd.grad(whole, scale)[0]
        whole.backward()
        assert scale.grad is not None
        return scale.grad

    with pytest.raises(UnsupportedError, match="got a second derivative"):
        torch.autograd.functional.hvp(loss, q, torch.ones_like(q))
    for power in (1, 2):
        for by_call in (False, True):
            with pytest.raises(UnsupportedError, match="got a second derivative"):
                penalty(power, "auto", by_call=by_call)
    assert penalty(2, "reference", by_call=True).isfinite().all()


def test_a_graph_that_nobody_differentiates_changes_nothing() -> None:
    q, k, v = made(70, 70)
    found = [
        torch.autograd.grad(MSSwift()(q, k, v).out.square().sum(), (q, k, v), create_graph=graph)
        for graph in (False, True)
    ]
    for plain, kept in zip(*found, strict=True):
        assert kept.requires_grad and torch.equal(plain, kept)
