"""Gradients of the compiled kernels against fp64, the eager backend and themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, MSSwift
from longswift.core.mechanism import Mechanism
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import eager, native, reference
from longswift.kernels.eager import whole
from longswift.mechanisms.patterned import full_pattern
from tests.kernels.test_flex import gradients
from tests.kernels.test_native import DTYPES, of, wide_problems
from tests.kernels.test_patterns import Problem

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)
# What patterns say of tokens that are seen from some row on.
FOREVER = 2**62


def weights_for(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(problem.q.shape[2])
    return torch.randn(*problem.q.shape[:3], problem.v.shape[3], generator=generator)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the output and the gradients of q, k and v: the largest distance from fp64."""
    return [float((x.double() - y).abs().max()) for x, y in zip(found, exact, strict=True)]


def check(problem: Problem, exact: list[Tensor]) -> None:
    weights = weights_for(problem).to(problem.q.dtype)
    plain = errors(gradients(eager, problem, weights), exact)
    found = gradients(native, problem, weights)
    assert all(x.dtype == problem.q.dtype for x in found)
    # Few numbers may be luckier than a rounding of the largest score allows.
    longest = [float(x.float().norm(dim=3).max()) for x in (problem.q, problem.k)]
    unit = torch.finfo(problem.q.dtype).eps * (1 + abs(problem.scale) * longest[0] * longest[1])
    for ours, theirs, x in zip(errors(found, exact), plain, exact, strict=True):
        assert ours <= 2 * theirs + unit * (1 + float(x.abs().max()))


@settings(max_examples=150)
@given(wide_problems(), st.sampled_from(DTYPES))
def test_as_exact_as_eager(problem: Problem, dtype: torch.dtype) -> None:
    problem = of(dtype, problem)
    weights = weights_for(problem).to(dtype).double()
    check(problem, gradients(reference, of(torch.float64, problem), weights))


def long_problem(causal: bool, queries: int, keys: int, scale: float = 0.2) -> Problem:
    """More rows and keys than a square has, windows of several tiles, pools, tokens in turn."""
    generator = torch.Generator().manual_seed(queries)
    block, bands = 96, (Band(tile=384, left=576), Band(tile=96, left=192))
    if not causal:
        bands = tuple(replace(band, right=192) for band in bands)
    offset = keys - queries
    blocks = range(offset // block, (keys - 1) // block + 1)
    tokens = torch.full((1, 2, len(blocks), 100), -1, dtype=torch.int32)
    since = torch.zeros_like(tokens)
    until = torch.full(tokens.shape, FOREVER)
    for head, band in enumerate(bands):
        for i, n in enumerate(blocks):
            start = n * block // band.tile * band.tile
            own = torch.arange(keys)
            free = own < start - band.left
            if not causal:
                free |= own >= start + band.tile + band.right
            some = own[free][torch.randperm(int(free.sum()), generator=generator)[:90]]
            tokens[0, head, i, : len(some)] = some.int()
            since[0, head, i] = n * block + torch.randint(-40, block, (100,), generator=generator)
            until[0, head, i, ::2] = since[0, head, i, ::2] + 30
    q, k, v = (
        torch.randn(2, heads, length, 48, generator=generator)
        for heads, length in ((4, queries), (2, keys), (2, keys))
    )
    pattern = BlockPattern(
        causal=causal,
        bands=bands,
        block=block,
        tokens=tokens,
        visible_from=since if causal else None,
        visible_until=None if causal else until,
        pool=192,
        pool_grain=96,
    )
    return Problem(pattern=pattern, q=q, k=k, v=v, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "queries"), [(True, 1100), (True, 777), (False, 1100)])
def test_many_rows_and_keys(causal: bool, queries: int, dtype: torch.dtype) -> None:
    problem = of(dtype, long_problem(causal, queries, 1100))
    weights = weights_for(problem).to(dtype).double()
    # The reference holds every pair of a token and a pool.
    check(problem, gradients(eager, of(torch.float64, problem), weights))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_any_sign(scale: float) -> None:
    problem = long_problem(True, 500, 500, scale)
    check(problem, gradients(eager, of(torch.float64, problem), weights_for(problem).double()))


def test_no_number_of_threads_changes_a_bit() -> None:
    problem = long_problem(True, 1000, 1100)
    weights, before = weights_for(problem), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(gradients(native, problem, weights))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_gradients_of_views_expanded_and_cut() -> None:
    """What autograd hands on need not be dense: a sum's gradient is one number."""
    problem = long_problem(True, 300, 400)
    leaves = [x.clone().requires_grad_() for x in problem.tensors]
    found, expected = (
        torch.autograd.grad(
            backend.attend(*leaves, problem.pattern, problem.scale).out[..., ::3].sum(), leaves
        )
        for backend in (native, eager)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    pattern = BlockPattern(causal=True, bands=(Band(tile=8, left=0, right=-8),), block=8)
    leaves = [torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3)]
    out = native.attend(*leaves, pattern, 0.25).out
    for x in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "causal"), [(700, True), (200, True), (300, False), (20, True)]
)
def test_full_attention(queries: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, h, n, 32) for h, n in ((4, queries), (2, 700), (2, 700)))
    problem = Problem(pattern=full_pattern(700, 2, causal), q=q, k=k, v=v, scale=0.2)
    problem = of(dtype, problem)
    weights = weights_for(problem).to(dtype).double()
    check(problem, gradients(reference, of(torch.float64, problem), weights))


@pytest.mark.parametrize("mechanism", [MSSwift(), Full()], ids=lambda m: m.name)
def test_short_calls_do_not_need_torchs_kernel(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "gradients", None)
    leaves = [torch.randn(1, 2, 90, 32, requires_grad=True) for _ in range(3)]
    found = torch.autograd.grad(mechanism(*leaves).out.square().sum(), leaves)
    expected = torch.autograd.grad(mechanism.reference(*leaves).out.square().sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remainder", [None, 64])
def test_ms_swift_while_training(remainder: int | None) -> None:
    attention = MSSwift(
        windows=(32, 96), block=32, sinks=3, key_tokens=16, dense_below=64, remainder=remainder
    )
    leaves = [torch.randn(2, heads, 500, 32, requires_grad=True) for heads in (4, 2, 2)]
    mask = torch.ones(2, 500, dtype=torch.bool)
    mask[0, :70], mask[1, 450:] = False, False
    weights = torch.randn(2, 4, 500, 32)
    found, expected = (
        torch.autograd.grad(
            (attention(*leaves, key_mask=mask, backend=backend).out * weights).sum(), leaves
        )
        for backend in ("native", "eager")
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
