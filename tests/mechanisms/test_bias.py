"""What a position bias means, beyond the properties that the table holds every mechanism to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longswift import Full, InputError, MSSwift, SlidingWindow, UnsupportedError, get_mechanism
from longswift.core.observe import Observed, observe
from longswift.extend.bias import ALiBi, ClippedBias, alibi_slopes
from longswift.kernels import triton
from longswift.mechanisms.selectors.base import Request, Selection, Selector
from longswift.mechanisms.selectors.bounds import Bounds
from tests.mechanisms.drawing import Inputs, allowed_pairs, inputs, masked_softmax, tolerance
from tests.mechanisms.table import CASES, Case

BIASED = [case for case in CASES if case.biased]
biased_of = pytest.mark.parametrize("case", BIASED, ids=lambda case: case.label)


def draw(n: int = 90, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float64) -> Inputs:
    q = torch.randn(2, heads, n, 8, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, n, 8, dtype=dtype)
    return Inputs(q=q, k=k, v=v)


def as_a_channel(x: Inputs, slopes: Tensor) -> Inputs:
    """ALiBi as one channel more: the key's place, weighed by the slope of the query's head."""
    scale = x.q.shape[3] ** -0.5
    q_more = (slopes / scale)[None, :, None, None].expand(*x.q.shape[:3], 1)
    place = torch.arange(x.k.shape[2], dtype=x.k.dtype)
    k_more = place[None, None, :, None].expand(*x.k.shape[:3], 1)
    q, k = torch.cat([x.q, q_more], 3), torch.cat([x.k, k_more], 3)
    return replace(x, q=q, k=k, scale=scale, bias=None)


@pytest.mark.parametrize("case", [c for c in BIASED if not c.content], ids=lambda case: case.label)
def test_alibi_is_a_channel_more(case: Case) -> None:
    """So every summary, too, gets the mean of what its tokens get."""
    heads = 2 * case.kv_heads[-1]
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    x = draw(heads=heads, kv_heads=case.kv_heads[-1])
    mechanism = case.build()
    by_channel = as_a_channel(x, slopes).run(mechanism)
    by_bias = replace(x, bias=ALiBi()).run(mechanism)
    torch.testing.assert_close(by_bias.out, by_channel.out)
    behind = slopes[:, None] * torch.arange(90)
    torch.testing.assert_close(by_bias.lse, by_channel.lse - behind)


@biased_of
def test_a_bias_of_zero_changes_nothing(case: Case) -> None:
    x = draw(kv_heads=case.kv_heads[-1], heads=case.kv_heads[-1])
    x = replace(x, causal=case.causal)
    zero = ClippedBias(table=torch.zeros(5, x.q.shape[1]))
    mechanism = case.build()
    plain, biased = x.run(mechanism), replace(x, bias=zero).run(mechanism)
    torch.testing.assert_close(biased.out, plain.out)
    torch.testing.assert_close(biased.lse, plain.lse)


@biased_of
def test_a_constant_moves_only_the_sum(case: Case) -> None:
    x = draw(kv_heads=case.kv_heads[-1], heads=case.kv_heads[-1])
    constant = ClippedBias(table=torch.full((1, x.q.shape[1]), 3.0, dtype=torch.float64))
    mechanism = case.build()
    plain, biased = x.run(mechanism), replace(x, bias=constant).run(mechanism)
    torch.testing.assert_close(biased.out, plain.out)
    torch.testing.assert_close(biased.lse, plain.lse + 3.0)


@pytest.mark.parametrize("case", [c for c in CASES if not c.biased], ids=lambda case: case.label)
def test_refused_where_it_has_no_meaning(case: Case) -> None:
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(UnsupportedError, match="bias"):
        case.build()(q, q, q, causal=case.causal, bias=ALiBi())
    with pytest.raises(UnsupportedError, match="bias"):
        case.build().visible(q, q, causal=case.causal, bias=ALiBi())


def test_wrong_biases_and_calls() -> None:
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 30, 8)
    with pytest.raises(InputError, match="a PositionBias"):
        Full()(q, q, q, bias=torch.zeros(20, 20))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="Cross attention has no distances"):
        Full()(q, k, k, causal=False, bias=ALiBi())
    with pytest.raises(InputError, match="2 query heads, got 3"):
        Full()(q, q, q, bias=ALiBi(slopes=(1.0,) * 3))


def test_backends_without_it_refuse() -> None:
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(UnsupportedError, match="a position bias"):
        Full()(q, q, q, backend="flex", bias=ALiBi())
    linear = triton.refusal(q, q, q, ALiBi().scores(q, q), "attend_linear")
    assert "no scores" in str(linear)
    assert triton.refusal(q, q, q, ALiBi().scores(q, q)) is None


@dataclass(frozen=True, kw_only=True)
class _Deaf(Selector):
    """A selector that was written without biases in mind."""

    name: ClassVar[str] = "deaf"

    def select(self, request: Request) -> Selection:
        raise AssertionError("asked to choose")


@pytest.mark.parametrize("causal", [True, False])
def test_corrections_know_it(causal: bool) -> None:
    """Exact rows are exact with the bias, too, and the gradient of what they add reaches it."""
    mechanism = MSSwift(
        windows=(16,), block=16, key_tokens=0, dense_below=0, remainder=None, sinks=0, delta=4
    )
    table = torch.randn(41, 4, dtype=torch.float64)
    x = replace(draw(), causal=causal, bias=ClippedBias(table=table)).with_grad()
    out = x.run(mechanism).out[:, :, ::4]
    full, _ = masked_softmax(x, allowed_pairs(x))
    torch.testing.assert_close(out, full[:, :, ::4])
    weights = torch.randn_like(out)
    for got, expected in zip(
        torch.autograd.grad((out * weights).sum(), x.leaves),
        torch.autograd.grad((full[:, :, ::4] * weights).sum(), x.leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_a_selector_that_ignores_it_is_refused() -> None:
    mechanism = MSSwift(windows=(16,), block=16, dense_below=0, selector=_Deaf(), key_tokens=8)
    q = torch.randn(1, 2, 90, 8)
    with pytest.raises(UnsupportedError, match="selector 'deaf'"):
        mechanism(q, q, q, bias=ALiBi())
    replace(mechanism, key_tokens=0)(q, q, q, bias=ALiBi())


def test_the_bias_takes_part_in_the_choice() -> None:
    """Keys that are all alike: only the bias says which to take."""
    mechanism = MSSwift(
        windows=(16,), block=16, sinks=0, key_tokens=4, dense_below=0, remainder=None,
        selector={"name": "bounds", "key_block": 4, "row_group": 4, "proposals": 1},
    )  # fmt: skip
    q, k = torch.randn(1, 1, 1, 8), torch.ones(1, 1, 200, 8)
    table = torch.zeros(399, 1)
    wanted = [41, 42, 43, 40]
    table[torch.tensor(wanted)] = 5.0  # row r: key r for the last query, at position 199
    seen = mechanism.visible(q, k, bias=ClippedBias(table=table))
    assert seen[0, 0, 0].nonzero().flatten()[:4].tolist() == sorted(wanted)
    assert not mechanism.visible(q, k)[0, 0, 0, wanted].all()


def test_pools_far_away_are_exact() -> None:
    """Sums of a long table keep their small digits: fp32 against fp64, values near 1,000."""
    n = 20_000
    q, k, v = (torch.randn(1, 1, length, 4) for length in (300, n, n))
    table = 1000 + torch.randn(2 * n - 1, 1)
    mechanism = MSSwift(windows=(128,), key_tokens=0, dense_below=0, remainder=16)
    results = []
    for dtype in (torch.float32, torch.float64):
        bias = ClippedBias(table=table.to(dtype))
        results.append(mechanism(*(x.to(dtype) for x in (q, k, v)), bias=bias))
    fast, exact = results
    torch.testing.assert_close(fast.lse.double(), exact.lse, rtol=0, atol=2e-4)
    torch.testing.assert_close(fast.out.double(), exact.out, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mechanism", [Full(), SlidingWindow(window=33, global_tokens=3)], ids=repr)
def test_low_precision(mechanism: Any, dtype: torch.dtype) -> None:
    """The bias itself is never rounded: distances of 600 need more than 8 bits."""
    x = replace(draw(600, dtype=torch.float32), bias=ALiBi()).to(dtype)
    r = x.run(mechanism)
    exact, lse = masked_softmax(x, mechanism.visible(x.q, x.k))
    error = (r.out.double() - exact).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * exact.square().mean().sqrt()
    torch.testing.assert_close(r.lse.double(), lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=15)
@given(st.data())
def test_global_tokens_anywhere(causal: bool, data: st.DataObject) -> None:
    """Rows that see everything lie scattered, so that their distances do not line up."""
    case = next(c for c in CASES if c.name == "longformer")
    x = data.draw(inputs(case, causal=causal, biases=("alibi", "clipped"), chunked=False))
    mechanism = case.build()
    r = x.run(mechanism)
    out, lse = masked_softmax(x, mechanism.visible(x.q, x.k, **x.options))
    torch.testing.assert_close(r.out.double(), out, **tolerance(x.q.dtype))
    torch.testing.assert_close(r.lse.double(), lse, **tolerance(x.q.dtype))


def test_the_guard_and_captured_mass_know_it() -> None:
    x = replace(draw(120), bias=ClippedBias(table=2 * torch.randn(61, 4, dtype=torch.float64)))
    mechanism = MSSwift(
        windows=(16,), block=16, key_tokens=8, dense_below=0, remainder=None, collect=True,
        selector={"name": "bounds", "key_block": 8, "row_group": 4}, sinks=4,
    )  # fmt: skip
    last = replace(x, q=x.q[:, :, -40:])
    r = last.run(mechanism)
    _, full = masked_softmax(last, allowed_pairs(last))
    mass = (r.lse - full).exp()
    assert r.stats.captured is not None and r.stats.captured.basis == "exact"
    torch.testing.assert_close(torch.tensor(r.stats.captured.mean), mass.mean((0, 2)).float())
    guarded = last.run(replace(mechanism, min_coverage=1.0))
    assert guarded.stats.extra["guard"]["dense"] > 0
    torch.testing.assert_close(guarded.lse, full)


def test_blocks_that_the_guard_fills_lie_anywhere() -> None:
    """Bidirectional: a stretch of dense blocks is not the end of the text."""
    table = 2 * torch.randn(61, 4, dtype=torch.float64)
    x = replace(draw(200), bias=ClippedBias(table=table), causal=False)
    mechanism = MSSwift(
        windows=(16,), block=16, key_tokens=8, dense_below=0, remainder=None, min_coverage=0.35,
        selector={"name": "bounds", "key_block": 8, "row_group": 4}, sinks=4,
    )  # fmt: skip
    r = x.run(mechanism)
    told = r.stats.extra["guard"]
    assert 0 < told["dense"] < told["blocks"]
    out, lse = masked_softmax(x, mechanism.visible(x.q, x.k, **x.options))
    torch.testing.assert_close(r.out, out)
    torch.testing.assert_close(r.lse, lse)


class _Largest(TorchDispatchMode):
    """The most elements any tensor had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                # A view may be larger than the memory behind it.
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("name", ["full", "ms_swift", "hierarchical"])
def test_memory_does_not_grow_with_the_square(name: str) -> None:
    n = 6144
    options = {"dense_below": 0} if name == "ms_swift" else {}
    x = Inputs(q=torch.randn(1, 1, n, 8), k=torch.randn(1, 1, n, 8), v=torch.randn(1, 1, n, 8))
    x = replace(x, bias=ClippedBias(table=torch.zeros(65, 1))).with_grad()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _Largest() as largest:
            r = x.run(get_mechanism(name, **options))
            torch.autograd.grad(r.out.sum(), x.leaves)
    finally:
        torch.set_num_threads(threads)
    assert largest.numel < n * n // 8


def test_observers_are_told() -> None:
    calls: list[Observed] = []
    bias, q = ALiBi(), torch.randn(1, 2, 20, 8)
    with observe(calls.append):
        Full()(q, q, q, bias=bias)
        Full()(q, q, q)
    assert [call.bias for call in calls] == [bias, None]


def test_a_group_of_rows_ends_with_its_block() -> None:
    """What follows a block is no part of its bias, however long groups may be."""
    selector = Bounds(key_block=1, row_group=32, proposals=1, most_proposals=1)
    mechanism = MSSwift(
        windows=(32,), key_tokens=3, selector=selector, block=16, dense_below=0, remainder=None
    )
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(2, 1, 2, 91, 4, generator=generator)
        bias = ClippedBias(table=3 * torch.randn(33, 2, generator=generator))
        whole = mechanism.visible(q, k, bias=bias)[:, :, :80, :80]
        part = mechanism.visible(q[:, :, :80], k[:, :, :80], bias=bias)
        assert torch.equal(whole, part)
