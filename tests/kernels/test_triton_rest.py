"""Gathered tokens and pools on top of the bands' result, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longswift.core.bias import ScoreBias
from longswift.core.pattern import Band, BlockPattern
from longswift.core.summary import KeySummary
from longswift.core.types import Partial
from longswift.kernels import reference, triton
from tests.kernels.test_patterns import CLOSE, Problem, gathered, problems

pytest.importorskip("triton", reason="triton is not installed")
from longswift.kernels.triton import rest  # noqa: E402

RUNS, WHY = triton.verify(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
if not RUNS:
    pytest.skip(WHY, allow_module_level=True)


def attended(problem: Problem, summary: KeySummary | None = None) -> Partial:
    """The rest on top of the reference's bands, written into a larger tensor of other strides."""
    tensors, pattern = problem.tensors, problem.pattern
    bands = reference.attend_bands(*tensors, pattern, problem.scale)
    out, lse = (torch.full((*x.shape[:2], 2 * x.shape[2], *x.shape[3:]), 7.0) for x in bands)
    bands = Partial(
        out.to(bands.out.dtype)[:, :, 1::2].copy_(bands.out),
        lse.to(bands.lse.dtype)[:, :, 1::2].copy_(bands.lse),
    )
    assert rest.takes(*tensors, pattern)
    part = rest.attend_rest(*tensors, pattern, problem.scale, bands, summary)
    assert part is bands
    return part


def check(problem: Problem, summary: KeySummary | None = None) -> None:
    slow = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    fast = attended(problem, summary)
    torch.testing.assert_close(fast.out, slow.out, **CLOSE)
    torch.testing.assert_close(fast.lse, slow.lse, **CLOSE)


@settings(max_examples=40)
@given(problems(longest=90))
def test_any_pattern(problem: Problem) -> None:
    """Causal or not, cut blocks, groups, values of another width, empty slots, any pools."""
    pattern = replace(problem.pattern, visible_from=None, visible_until=None)
    problem = replace(problem, pattern=pattern)
    if rest.takes(*problem.tensors, pattern):
        check(problem)


def small(
    *, causal: bool, pool: int | None, q_len: int = 70, slots: int = 12, dim: int = 16
) -> Problem:
    """Two KV heads of three query heads each over 96 keys."""
    generator = torch.Generator().manual_seed(0)
    right = 0 if causal else 8
    bands = (Band(tile=16, left=8, right=right), Band(tile=32, left=24, right=right))
    tokens, _ = gathered(bands, 2, 16, q_len, 96, causal, slots, generator)

    def tensor(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)

    return Problem(
        pattern=BlockPattern(
            causal=causal, bands=bands, block=16, tokens=tokens, pool=pool, pool_grain=8
        ),
        q=tensor(6, q_len),
        k=tensor(2, 96),
        v=tensor(2, 96),
        scale=0.25,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("keys", "wide"), [(16, 16), (16, 64), (64, 16)])
def test_runs_of_blocks(
    causal: bool, keys: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of few blocks at a time, tiles smaller than what they go over."""
    monkeypatch.setattr(rest, "ROOM", 1 << 16)
    monkeypatch.setattr(rest, "TILES", {4: {64: rest.Tile(16, keys, 4, 1)}})
    monkeypatch.setattr(rest, "COLUMNS", {4: {64: (wide, 16, 4, None)}})
    check(small(causal=causal, pool=8, q_len=70 if causal else 96, slots=40))


@pytest.mark.parametrize("causal", [True, False])
def test_columns_of_nothing(causal: bool) -> None:
    """Pools whose every token is gathered vanish, and so do all of a block."""
    problem = small(causal=causal, pool=8, q_len=96, slots=96)
    generator = torch.Generator().manual_seed(1)
    tokens, _ = gathered(problem.pattern.bands, 2, 16, 96, 96, causal, 96, generator)
    every = torch.arange(96).expand_as(tokens)
    edges = torch.stack(
        [torch.stack(b.bounds(torch.arange(0, 96, 16), 96), -1) for b in problem.pattern.bands]
    )
    outside = (every < edges[..., :1]) | (not causal) & (every >= edges[..., 1:])
    tokens = torch.where(outside, every, -1).flip(3)
    check(replace(problem, pattern=replace(problem.pattern, tokens=tokens)))


@pytest.mark.parametrize("pool", [None, 8, 32, 512])
def test_one_query(pool: int | None) -> None:
    """Decoding, with lists that batch rows share and page summaries."""
    problem = small(causal=True, pool=pool, q_len=1)
    tokens = problem.pattern.tokens
    assert tokens is not None
    problem = replace(problem, pattern=replace(problem.pattern, tokens=tokens[:1]))
    check(problem, KeySummary.build(problem.k, problem.v, 8))


def test_pools_alone() -> None:
    problem = small(causal=True, pool=16)
    check(replace(problem, pattern=replace(problem.pattern, tokens=None)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    """Sums are fp32; mean keys and values are rounded to the precision of the others."""
    problem = small(causal=True, pool=16, dim=48)
    exact = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    rounded = replace(problem, **{x: getattr(problem, x).to(dtype) for x in "qkv"})
    part = triton.attend(*rounded.tensors, problem.pattern, problem.scale)
    assert part.out.dtype == dtype and part.lse.dtype == torch.float32
    # What rounding the inputs alone changes is the measure.
    widened = (x.double() for x in rounded.tensors)
    other = reference.attend(*widened, problem.pattern, problem.scale)
    for got, right, near in zip(part, exact, other, strict=True):
        least = 1e-5 if dtype == torch.float32 else 1e-3
        allowed = max(least, 3 * float((near - right).abs().max()))
        assert float((got.double() - right).abs().max()) <= allowed


def test_given_bands_are_overwritten() -> None:
    problem = small(causal=True, pool=16)
    bands = triton.attend_bands(*problem.tensors, problem.pattern, problem.scale)
    part = triton.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands)
    assert part.out is bands.out and part.lse is bands.lse


def test_what_it_leaves_to_others() -> None:
    """Biases, lists that rows do not share, nothing outside the bands, heads that fit no tile."""
    problem = small(causal=True, pool=16)
    tensors, pattern = problem.tensors, problem.pattern
    assert rest.takes(*tensors, pattern)
    assert not rest.takes(*tensors, replace(pattern, visible_from=pattern.tokens))
    assert not rest.takes(*tensors, replace(pattern, tokens=None, pool=None))
    bias = ScoreBias(values=torch.zeros(6, 165, dtype=torch.float64), zero=95)
    assert not rest.takes(*tensors, pattern, bias)
    wide = [x.new_zeros(*x.shape[:3], 300) for x in tensors]
    assert not rest.takes(*wide, pattern)
