"""The compiled kernels against the dense reference and the eager backend."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, InputError, MSSwift, SlidingWindow, UnsupportedError
from longswift.core import compiled
from longswift.core.pattern import Band, BlockPattern
from longswift.core.types import Partial
from longswift.kernels import eager, native, reference
from longswift.mechanisms.patterned import full_pattern
from longswift.mechanisms.selectors.bounds import Bounds
from longswift.mechanisms.selectors.centroids import Centroids
from longswift.memory.paged_kv import PagedKV
from tests.kernels.test_flex import gradients
from tests.kernels.test_patterns import Problem, problems

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def wide_problems(draw: st.DrawFn) -> Problem:
    """Patterns as wild as ever, and heads that these kernels take, next to each other or not."""
    found = draw(problems(longest=150))
    dim, value_dim = draw(
        st.sampled_from([(16, 16), (64, 32), (48, 80), (32, 64), (96, 32), (128, 96)])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["dense", "by token", "cut"]))

    def new(x: Tensor, width: int) -> Tensor:
        batch, heads, length = x.shape[:3]
        if layout == "cut":
            # Rows a whole, but not an even, number of values apart.
            return torch.randn(batch, heads, length, width + 1, generator=generator)[..., :width]
        if layout == "by token":
            return torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, heads, length, width, generator=generator)

    widths = (dim, dim, value_dim)
    q, k, v = (new(x, width) for x, width in zip(found.tensors, widths, strict=True))
    return replace(found, q=q, k=k, v=v)


def of(dtype: torch.dtype, problem: Problem) -> Problem:
    def converted(x: Tensor) -> Tensor:
        if x.stride(2) == x.shape[3] + 1:
            wide = torch.empty(*x.shape[:3], x.shape[3] + 1, dtype=dtype)
            wide[..., :-1] = x
            return wide[..., :-1]
        return x.to(dtype)

    return replace(problem, **{name: converted(getattr(problem, name)) for name in "qkv"})


def error(got: Partial, exact: Partial) -> tuple[float, float]:
    seen = exact.lse.isfinite()
    assert torch.equal(got.lse.isfinite(), seen)
    out = (got.out.double() - exact.out).abs().amax()
    lse = (got.lse[seen].double() - exact.lse[seen]).abs().amax() if seen.any() else out
    return float(out), float(lse)


@settings(max_examples=150)
@given(wide_problems(), st.sampled_from(DTYPES))
def test_forward(problem: Problem, dtype: torch.dtype) -> None:
    """At most twice as far from fp64 as the eager kernel, for the same rounded inputs."""
    problem = of(dtype, problem)
    arguments = (problem.pattern, problem.scale)
    exact = reference.attend(*of(torch.float64, problem).tensors, *arguments)
    plain = error(eager.attend(*problem.tensors, *arguments), exact)
    fast = native.attend(*problem.tensors, *arguments)
    assert fast.out.dtype == dtype and fast.lse.dtype == torch.float32
    # Few rows may be luckier than a rounding of their largest score allows.
    longest = [float(x.float().norm(dim=3).max()) for x in (problem.q, problem.k)]
    unit = torch.finfo(dtype).eps * (1 + abs(problem.scale) * longest[0] * longest[1])
    for ours, theirs in zip(error(fast, exact), plain, strict=True):
        assert ours <= 2 * theirs + unit
    bands = native.attend_bands(*problem.tensors, *arguments)
    again = native.attend(*problem.tensors, *arguments, bands=bands)
    assert torch.equal(again.out, fast.out) and torch.equal(again.lse, fast.lse)


@settings(max_examples=100)
@given(wide_problems(), st.sampled_from(DTYPES))
def test_a_single_row(problem: Problem, dtype: torch.dtype) -> None:
    """Read where they lie: windows, gathered tokens, means."""
    pattern = problem.pattern
    if pattern.tokens is not None:
        last = {
            name: None if slots is None else slots[:, :, -1:]
            for name in ("tokens", "visible_from", "visible_until")
            for slots in [getattr(pattern, name)]
        }
        pattern = replace(pattern, **last)
    if pattern.causal:
        row = replace(problem, q=problem.q[:, :, -1:], pattern=pattern)
        test_forward.hypothesis.inner_test(row, dtype)


@settings(max_examples=30)
@given(wide_problems())
def test_bands(problem: Problem) -> None:
    pattern = replace(problem.pattern, tokens=None, visible_from=None, visible_until=None)
    pattern = replace(pattern, pool=None)
    exact = reference.attend(*of(torch.float64, problem).tensors, pattern, problem.scale)
    fast = native.attend_bands(*problem.tensors, pattern, problem.scale)
    torch.testing.assert_close(fast.out.double(), exact.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.lse.double(), exact.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_keys_than_a_panel(dtype: torch.dtype) -> None:
    """Windows and remainders wider than one product, of rows that come in several pieces."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, 32, generator=generator).to(dtype)
        for heads, length in ((4, 900), (2, 1100), (2, 1100))
    )
    bands = (Band(tile=256, left=640), Band(tile=128, left=0, reach=(70, 0)))
    windows = BlockPattern(causal=True, bands=bands)
    pooled = BlockPattern(
        causal=True, bands=(bands[0], replace(bands[1], reach=None)), block=64, pool=1
    )
    for pattern in (windows, pooled):
        # The reference holds every pair of a token and a pool.
        exact = eager.attend(*(x.double() for x in (q, k, v)), pattern, 0.2)
        plain = error(eager.attend(q, k, v, pattern, 0.2), exact)
        ours = error(native.attend(q, k, v, pattern, 0.2), exact)
        for mine, theirs in zip(ours, plain, strict=True):
            assert mine <= 2 * theirs + torch.finfo(dtype).eps


def test_gradients_are_the_eager_kernels_of_its_own_output() -> None:
    pattern = BlockPattern(causal=True, bands=(Band(tile=16, left=16),), block=16)
    q, k, v = torch.randn(3, 1, 1, 50, 16)
    problem = Problem(pattern=pattern, q=q, k=k, v=v, scale=0.25)
    weights = torch.randn(1, 1, 50, 16)
    for ours, theirs in zip(
        gradients(native, problem, weights), gradients(eager, problem, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    st.booleans(),
    st.integers(150, 700),
    st.sampled_from([None, 64]),
    st.sampled_from([(1, 1), (4, 2)]),
    st.integers(0, 2**31),
)
def test_ms_swift_is_softmax_over_what_it_saw(
    causal: bool, length: int, remainder: int | None, heads: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, length, 32, generator=generator) for h in (heads[0], heads[1], heads[1])
    )
    attention = MSSwift(
        windows=(32, 96), block=32, sinks=3, key_tokens=16, dense_below=64, remainder=remainder
    )
    result = attention(q, k, v, causal=causal, backend="native")
    assert result.stats.backend == "native"
    if remainder is not None:
        expected = attention(q, k, v, causal=causal, backend="eager")
        close = torch.isclose(result.out, expected.out, rtol=1e-4, atol=1e-5).all(-1)
        # Sums in another order may turn a near tie around, for one block and its group of heads.
        assert (~close).sum() <= 32 * heads[0] // heads[1]
        return
    # `visible` goes through the same kernels, which are what "auto" means here.
    seen = attention.visible(q, k, causal=causal)
    group = heads[0] // heads[1]
    keys, values = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = q.double() @ keys.mT * 32**-0.5
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(result.out.double(), probs @ values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", [Centroids(), Bounds(), Bounds(tree=2, proposals=1)])
def test_what_a_block_sees_depends_on_nothing_later_and_on_no_neighbour(selector: Bounds) -> None:
    attention = MSSwift(
        windows=(32, 96), block=32, key_tokens=16, dense_below=64, selector=selector
    )
    q, k, v = torch.randn(3, 2, 2, 512, 32)
    whole = attention(q, k, v)
    assert whole.stats.backend == "native"
    for row in range(2):
        alone = attention(*(x[row : row + 1] for x in (q, k, v)))
        assert torch.equal(alone.out[0], whole.out[row])
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 320:] = torch.randn_like(x[:, :, 320:])
    assert torch.equal(attention(*changed).out[:, :, :320], whole.out[:, :, :320])
    chunks = [
        attention(q[:, :, a : a + 128], k[:, :, : a + 128], v[:, :, : a + 128])
        for a in range(0, 512, 128)
    ]
    together = torch.cat([chunk.out for chunk in chunks], 2)
    torch.testing.assert_close(together, whole.out, rtol=1e-4, atol=1e-5)
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[0, :88], mask[1, 512:] = False, False
    padded = torch.randn(3, 2, 2, 600, 32)
    padded[:, 0, :, 88:], padded[:, 1, :, :512] = (
        torch.stack([x[row] for x in (q, k, v)]) for row in range(2)
    )
    out = attention(*padded, key_mask=mask).out
    assert torch.equal(out[0, :, 88:], whole.out[0]) and torch.equal(out[1, :, :512], whole.out[1])


@pytest.mark.parametrize(
    "options",
    [{"coverage": 0.9}, {"causality": "strict"}, {"selector": Bounds(tree=128)}, {"delta": 8}],
    ids=lambda o: next(iter(o)),
)
def test_rarer_settings_give_the_same(options: dict[str, Any]) -> None:
    attention = MSSwift(windows=(32,), block=32, key_tokens=16, dense_below=64, **options)
    q, k, v = torch.randn(3, 1, 2, 400, 32)
    fast, slow = (attention(q, k, v, backend=b) for b in ("native", "eager"))
    torch.testing.assert_close(fast.out, slow.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.lse, slow.lse, rtol=1e-5, atol=1e-5)


def test_sums_of_a_growing_cache_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers have room for more; a copy for every token would cost more than attending."""
    pages = PagedKV()
    with torch.no_grad():
        for length in (600, 200):
            k, v = pages.append(*torch.randn(2, 1, 2, length, 32))
            summary = pages.summary()
    assert summary is not None and not summary.k_sum.is_contiguous()
    operators, read = compiled.loaded(), []

    def merge(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, *rest: Any) -> None:
        read.extend(rest[:2])
        operators.merge(q, k, v, tokens, *rest)

    names = {name: getattr(operators, name) for name in ("tiles", "choose_few")}
    spied = SimpleNamespace(merge=merge, **names)
    mechanism, q = MSSwift(windows=(64,), key_tokens=8, dense_below=0), torch.randn(1, 4, 1, 32)
    plain = mechanism(q, k, v, backend="native")
    monkeypatch.setattr(compiled, "loaded", lambda: spied)
    found = mechanism(q, k, v, backend="native", summary=summary)
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in (summary.k_sum, summary.v_sum)]
    torch.testing.assert_close(found.out, plain.out, rtol=1e-5, atol=1e-6)


def test_large_scores_stay_finite() -> None:
    attention = MSSwift(windows=(32,), block=32, key_tokens=16, dense_below=64)
    q, k, v = torch.randn(3, 1, 2, 400, 32)
    result = attention(60 * q, 60 * k, v, backend="native")
    assert result.out.isfinite().all() and result.lse.isfinite().all()
    # The tokens a query needs most are found whatever the scale: nothing underflows in the choice.
    everything = Full()(60 * q, 60 * k, v).lse
    assert ((result.lse - everything).abs() < 1.0).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_scores_beyond_every_number_are_not_passed_over(rows: int, dtype: torch.dtype) -> None:
    """Finite inputs whose products are not: NaN, as from softmax, not rows that saw nothing."""
    q, k, v = torch.randn(3, 1, 2, 200, 32).to(dtype)
    swift = MSSwift(windows=(32,), block=32, key_tokens=16, dense_below=0)
    for mechanism in (SlidingWindow(window=8), swift, Full()):
        result = mechanism(1e30 * q[:, :, -rows:], 1e30 * k, v)
        assert result.out.isnan().any(3).all() and not result.lse.isfinite().any()


def test_scales_of_any_sign() -> None:
    attention = SlidingWindow(window=20)
    q, k, v = torch.randn(3, 1, 2, 60, 16)
    for scale in (0.0, -0.4, 3.0):
        fast, slow = (attention(q, k, v, scale=scale, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(fast.out, slow.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 33, 24).to(dtype)
    k = torch.cat([k, k], 3)[..., :24]
    for place in ((0, 0, 0, 0), (0, 1, 32, 23), (0, 0, 17, 5)):
        broken = k.clone()
        broken[place] = bad
        with pytest.raises(InputError, match="k: expected finite"):
            SlidingWindow(window=8)(q, broken, v)
    SlidingWindow(window=8)(q, k, v)


def test_what_it_cannot_compute_is_refused_by_name_and_left_to_eager_by_auto() -> None:
    odd = torch.randn(1, 1, 4, 24)
    wide = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64"):
        SlidingWindow(window=2)(wide, wide, wide, backend="native")
    assert SlidingWindow(window=2)(wide, wide, wide).stats.backend == "eager"
    with pytest.raises(UnsupportedError, match="multiples of 16"):
        native.attend(odd, odd, odd, full_pattern(4, 1, True), 1.0)
    # Mechanisms fill them up.
    assert SlidingWindow(window=2)(odd, odd, odd, backend="native").stats.backend == "native"
    even = torch.randn(1, 1, 4, 16)
    assert SlidingWindow(window=2)(even, even, even).stats.backend == "native"
