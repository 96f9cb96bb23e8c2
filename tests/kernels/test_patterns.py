"""Every backend on random patterns, wilder than any mechanism makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern
from longswift.core.summary import KeySummary
from longswift.kernels import eager, reference


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pattern and inputs it fits."""

    pattern: BlockPattern
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        shapes = [tuple(x.shape) for x in self.tensors]
        printer.text(f"{shapes} {self.pattern!r}")  # type: ignore[attr-defined]


@st.composite
def problems(draw: st.DrawFn, *, longest: int = 120) -> Problem:
    causal = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    block = draw(st.sampled_from([4, 8, 16]))
    grain = draw(st.sampled_from([g for g in (1, 2, 4, 8) if block % g == 0]))
    pool = draw(st.sampled_from([None, grain, 4 * grain, 24 * grain]))
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    k_len = draw(st.integers(1, longest))
    q_len = draw(st.integers(1, k_len)) if causal else k_len

    def band() -> Band:
        left = draw(st.integers(0, 30)) if pool is None else grain * draw(st.integers(0, 12))
        right = 0 if causal else (left if pool is None else grain * draw(st.integers(0, 12)))
        limit = None
        if pool is None and draw(st.integers(0, 5)) == 0:
            tile = block * draw(st.integers(1, 4))
            return Band(tile=tile, left=0, right=-tile)
        if pool is None and draw(st.booleans()):
            limit = (draw(st.integers(0, 40)), 0 if causal else draw(st.integers(0, 40)))
        return Band(tile=block * draw(st.integers(1, 4)), left=left, right=right, reach=limit)

    bands = tuple(band() for _ in range(kv_heads))
    if draw(st.booleans()):
        bands = bands[:1] * kv_heads
    batch = draw(st.integers(1, 2))
    tokens = since = until = None
    if draw(st.booleans()):
        slots = draw(st.integers(0, 12))
        tokens, since = gathered(bands, batch, block, q_len, k_len, causal, slots, generator)
        if draw(st.booleans()):
            until = since + torch.randint(0, 2 * block, since.shape, generator=generator)
        if draw(st.booleans()):
            since = None
        if draw(st.booleans()):
            tokens = tokens.int()
    dim, v_dim = draw(st.sampled_from([(4, 4), (8, 3)]))

    def tensor(heads: int, length: int, width: int) -> Tensor:
        x = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2)

    return Problem(
        pattern=BlockPattern(
            causal=causal,
            bands=bands,
            block=block,
            tokens=tokens,
            visible_from=since,
            visible_until=until,
            pool=pool,
            pool_grain=grain if pool is not None else 1,
        ),
        q=tensor(kv_heads * groups, q_len, dim),
        k=tensor(kv_heads, k_len, dim),
        v=tensor(kv_heads, k_len, v_dim),
        scale=0.5,
    )


def gathered(
    bands: tuple[Band, ...],
    batch: int,
    block: int,
    q_len: int,
    k_len: int,
    causal: bool,
    slots: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Random distinct tokens outside each block's band, and since when rows see them."""
    offset = k_len - q_len
    blocks = list(range(offset // block, (k_len - 1) // block + 1))
    tokens = torch.full((batch, len(bands), len(blocks), slots), -1)
    since = torch.zeros_like(tokens)
    for b in range(batch):
        for h, band in enumerate(bands):
            for i, index in enumerate(blocks):
                start = index * block // band.tile * band.tile
                first, last = start - band.left, start + band.tile + band.right
                free = [j for j in range(k_len) if j < first or (not causal and j >= last)]
                order = torch.randperm(len(free), generator=generator)[:slots].tolist()
                for slot, j in enumerate(order):
                    if torch.rand((), generator=generator) < 0.8:
                        tokens[b, h, i, slot] = free[j]
                shift = torch.randint(-2, block + 2, (slots,), generator=generator)
                since[b, h, i] = index * block + shift
    return tokens, since


def attend_naively(problem: Problem) -> tuple[Tensor, Tensor]:
    """Row by row and key by key, as ``BlockPattern`` describes it."""
    p, (batch, heads, q_len, _), k_len = problem.pattern, problem.q.shape, problem.k.shape[2]
    groups, offset = heads // len(p.bands), k_len - q_len
    out = problem.q.new_zeros(batch, heads, q_len, problem.v.shape[3])
    lse = problem.q.new_full((batch, heads, q_len), -math.inf)
    for b in range(batch):
        for h in range(heads):
            band, k, v = p.bands[h // groups], problem.k[b, h // groups], problem.v[b, h // groups]
            for row in range(q_len):
                position = offset + row
                start = position // band.tile * band.tile
                first, last = max(0, start - band.left), min(k_len, start + band.tile + band.right)
                inside = set(range(first, last))
                if band.reach is not None:
                    lowest, highest = position - band.reach[0], position + band.reach[1]
                    inside = {j for j in inside if lowest <= j <= highest}
                index = position // p.block - offset // p.block
                picked: set[int] = set()
                if p.tokens is not None:
                    for slot, j in enumerate(p.tokens[b, h // groups, index].tolist()):
                        since = p.visible_from
                        shown = since is None or since[b, h // groups, index, slot] <= position
                        until = p.visible_until
                        if until is not None:
                            shown = shown and position < until[b, h // groups, index, slot]
                        if j >= 0 and shown:
                            picked.add(j)
                exact = sorted(j for j in inside | picked if not p.causal or j <= position)
                groups_of = [[j] for j in exact]
                if p.pool is not None:
                    for pool in range(0, k_len, p.pool):
                        rest = [
                            j for j in range(pool, min(pool + p.pool, k_len)) if j not in picked
                        ]
                        groups_of.append([j for j in rest if j < first])
                        if not p.causal:
                            groups_of.append([j for j in rest if j >= last])
                groups_of = [g for g in groups_of if g]
                if not groups_of:
                    continue
                member = torch.zeros(len(groups_of), k_len, dtype=torch.float64)
                for column, keys in enumerate(groups_of):
                    member[column, keys] = 1.0
                count = member.sum(1)
                scores = (member @ k / count[:, None]) @ problem.q[b, h, row] * problem.scale
                scores, values = scores + count.log(), member @ v / count[:, None]
                out[b, h, row] = scores.softmax(0) @ values
                lse[b, h, row] = scores.logsumexp(0)
    return out, lse


CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@settings(max_examples=20)
@given(problems(longest=60))
def test_reference_is_the_definition(problem: Problem) -> None:
    out, lse = attend_naively(problem)
    part = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    torch.testing.assert_close(part.out, out, **CLOSE)
    torch.testing.assert_close(part.lse, lse, **CLOSE)


@settings(max_examples=80)
@given(problems())
def test_eager_forward(problem: Problem) -> None:
    slow = reference.attend(*problem.tensors, problem.pattern, problem.scale)
    fast = eager.attend(*problem.tensors, problem.pattern, problem.scale)
    torch.testing.assert_close(fast.out, slow.out, **CLOSE)
    torch.testing.assert_close(fast.lse, slow.lse, **CLOSE)
    bands = eager.attend_bands(*problem.tensors, problem.pattern, problem.scale)
    given_bands = eager.attend(*problem.tensors, problem.pattern, problem.scale, bands=bands)
    assert torch.equal(given_bands.out, fast.out)


@settings(max_examples=60)
@given(problems())
def test_eager_gradients(problem: Problem) -> None:
    grads = []
    weights = torch.randn(*problem.q.shape[:3], problem.v.shape[3], dtype=torch.float64)
    for backend in (eager, reference):
        leaves = [x.detach().clone().requires_grad_() for x in problem.tensors]
        out, lse = backend.attend(*leaves, problem.pattern, problem.scale)
        loss = (out * weights).sum() + lse[lse.isfinite()].sum()
        if not loss.requires_grad:
            return
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for fast, slow in zip(*grads, strict=True):
        expected = torch.zeros_like(fast) if slow is None else slow.nan_to_num()
        torch.testing.assert_close(fast, expected, **CLOSE)


@settings(max_examples=30)
@given(problems(), st.sampled_from([1, 2, 4]))
def test_summaries_change_nothing(problem: Problem, page: int) -> None:
    summary = KeySummary.build(problem.k, problem.v, page)
    plain = eager.attend(*problem.tensors, problem.pattern, problem.scale)
    helped = eager.attend(*problem.tensors, problem.pattern, problem.scale, summary=summary)
    torch.testing.assert_close(helped.out, plain.out, **CLOSE)
    torch.testing.assert_close(helped.lse, plain.lse, **CLOSE)


@pytest.mark.parametrize("limit", [7, 64])
@pytest.mark.parametrize("v_width", [8, 5])
def test_small_steps_give_the_same(
    limit: int, v_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes at which work is cut decide speed, not results."""
    generator = torch.Generator().manual_seed(0)
    bands = (Band(tile=32, left=16), Band(tile=16, left=48))
    tokens, _ = gathered(bands, 2, 16, 150, 170, True, 9, generator)
    pattern = BlockPattern(
        causal=True, bands=bands, block=16, tokens=tokens, pool=32, pool_grain=16
    )
    leaves = [
        torch.randn(2, heads, length, width, dtype=torch.float64, requires_grad=True)
        for heads, length, width in ((4, 150, 8), (2, 170, 8), (2, 170, v_width))
    ]

    def everything() -> list[Tensor]:
        out, lse = eager.attend(*leaves, pattern, 0.3)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)]

    expected = everything()
    monkeypatch.setattr("longswift.kernels.eager.bands._ROWS", limit)
    monkeypatch.setattr("longswift.kernels.eager.bands._SCORES", limit)
    monkeypatch.setattr("longswift.kernels.eager.bands._UNFUSED_ROWS", limit)
    monkeypatch.setattr("longswift.kernels.eager.band_gradients._SCORES", limit)
    monkeypatch.setattr("longswift.kernels.eager.band_gradients._ROWS", limit)
    monkeypatch.setattr("longswift.kernels.eager.unfused._KEYS", limit)
    monkeypatch.setattr("longswift.kernels.eager.gathered._STEP_BYTES", limit)
    for a, b in zip(everything(), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@settings(max_examples=60)
@given(problems(), st.sampled_from([1, 5, 64]))
def test_products_of_a_fast_library(problem: Problem, rows: int) -> None:
    """fp32 through oneDNN, however small the pieces, forward and backward."""
    single = replace(problem, **{name: getattr(problem, name).float() for name in ("q", "k", "v")})
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longswift.kernels.eager.bands.onednn_beats_blas", lambda: True)
        patch.setattr("longswift.kernels.eager.bands._FEW_SCORES", 0)
        patch.setattr("longswift.kernels.eager.bands._UNFUSED_ROWS", rows)
        patch.setattr(
            "longswift.core.products.onednn_beats_blas", torch.backends.mkldnn.is_available
        )
        patch.setattr("longswift.core.products._WORTH_A_CALL", 1)
        for backend, chosen in ((eager, single), (reference, problem)):
            leaves = [x.detach().clone().requires_grad_() for x in chosen.tensors]
            out, lse = backend.attend(*leaves, chosen.pattern, chosen.scale)
            loss = out.square().sum() + lse[lse.isfinite()].sum()
            grads = [torch.zeros_like(x) for x in leaves]
            if loss.requires_grad:
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                grads = [a if b is None else b for a, b in zip(grads, found, strict=True)]
            results.append([out, lse, *(g.nan_to_num() for g in grads)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unfused_low_precision_is_nearly_as_good_as_fused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(1, 2, 700, 64).to(dtype) for _ in range(3))
    pattern = BlockPattern(causal=True, bands=(Band(tile=700, left=0),) * 2)
    exact = reference.attend(q.double(), k.double(), v.double(), pattern, 0.3).out
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    monkeypatch.setattr("longswift.kernels.eager.bands.onednn_beats_blas", lambda: True)
    unfused = eager.attend(q, k, v, pattern, 0.3)
    errors = [(out.double() - exact).square().mean().sqrt() for out in (unfused.out, fused)]
    assert errors[0] <= 1.5 * errors[1]
