"""The compiled choice of key tokens against the choices of the eager backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, MSSwift
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import eager, native
from longswift.kernels.native import choosing
from longswift.kernels.native.factors import ranking_dtype
from longswift.mechanisms.selectors.base import Request, Selection
from longswift.mechanisms.selectors.bounds import Bounds
from longswift.mechanisms.selectors.centroids import Centroids

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)


def asked(
    q: Tensor,
    k: Tensor,
    pattern: BlockPattern,
    scale: float,
    *,
    sinks: int,
    budget: int,
    key_block: int = 4,
    strict: bool = False,
) -> Request:
    """What a selector is asked for blocks that see the pattern's bands."""
    return Request(
        q=q,
        k=k,
        scale=scale,
        key_block=key_block,
        pattern=pattern,
        band_lse=eager.attend_bands(q, k, k, pattern, scale).lse,
        sinks=sinks,
        budget=budget,
        coverage=None,
        strict=strict,
    )


@st.composite
def requests(draw: st.DrawFn, longest: int = 400, centroids: bool = True) -> tuple[Bounds, Request]:
    causal = draw(st.booleans())
    block = draw(st.sampled_from([16, 32, 64]))
    key_block = draw(st.sampled_from([1, 4, 8]))
    row_group = draw(st.sampled_from([4, 16, 32]))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    k_len = draw(st.integers(block + 1, longest))
    q_len = draw(st.integers(1, k_len)) if causal else k_len
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left = draw(st.integers(0, 8)) * 8
    bands = tuple(
        Band(tile=block * (1 + h), left=left, right=0 if causal else left) for h in range(kv_heads)
    )
    pattern = BlockPattern(causal=causal, bands=bands, block=block)
    heads = kv_heads * groups
    q = torch.randn(batch, q_len, heads, 32, generator=generator).transpose(1, 2)
    k = 2 * torch.randn(batch, kv_heads, k_len, 32, generator=generator)
    request = asked(
        q,
        k,
        pattern,
        32**-0.5,
        key_block=key_block,
        sinks=draw(st.integers(0, 9)),
        budget=draw(st.sampled_from([1, 7, 16, 64])),
        strict=causal and draw(st.booleans()),
    )
    options = {"key_block": key_block, "proposals": draw(st.sampled_from([1, 2, 3, 100]))}
    if centroids and draw(st.booleans()):
        return Centroids(
            rows=draw(st.sampled_from([1, 3, 8, 64])),
            far=draw(st.sampled_from([50, 1000])),
            **options,
        ), request
    row_radius = draw(st.sampled_from([0.0, 0.5]))
    return Bounds(row_group=row_group, row_radius=row_radius, **options), request


@settings(max_examples=200)
@given(requests())
def test_choices(drawn: tuple[Bounds, Request]) -> None:
    """The tokens that the eager backend chooses, block by block, whatever the order."""
    agree(*drawn)


@settings(max_examples=100)
@given(requests(longest=3000), st.integers(1, 5))
def test_choices_for_few_rows(drawn: tuple[Bounds, Request], rows: int) -> None:
    """Decoding and short questions, whose scores are kept."""
    selector, request = drawn
    if request.pattern.causal and not request.strict:
        q, lse = request.q[:, :, -rows:], request.band_lse[:, :, -rows:]
        agree(selector, replace(request, q=q, band_lse=lse))


@settings(max_examples=150)
@given(
    requests(longest=2500, centroids=False),
    st.sampled_from([2, 4, 16, 64]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 5, 16]),
)
def test_choices_by_a_tree(
    drawn: tuple[Bounds, Request], tree: int, beam: int, budget: int
) -> None:
    """Entered at any level, with candidates on one side of the window or on both."""
    selector, request = drawn
    few = replace(selector, tree=tree, beam=beam, proposals=min(2, selector.proposals))
    agree(few, replace(request, budget=budget, strict=False))


def agree(selector: Bounds, request: Request) -> None:
    slow = ordered(selector.select(request))
    fast = ordered(selector.select(replace(request, choose_by_bounds=native.choose_by_bounds)))
    assert fast.shape == slow.shape
    different = int((fast != slow).any(-1).sum())
    # Sums in another order may turn a near tie around, in one block of a thousand.
    assert different == 0 or (different == 1 and slow.numel() > 0 and overlap(fast, slow) > 0.9)


def ordered(found: Selection) -> Tensor:
    """Each block's tokens, and from where each is seen, as numbers in ascending order."""
    assert found.tokens.dtype == torch.int32
    tokens = found.tokens.long()
    if found.visible_from is not None:
        seen_from = torch.where(tokens < 0, 0, found.visible_from.long())
        tokens = tokens * 1000 + seen_from
    return tokens.sort(-1).values


def overlap(a: Tensor, b: Tensor) -> float:
    same = total = 0
    for x, y in zip(a.flatten(0, 2).tolist(), b.flatten(0, 2).tolist(), strict=True):
        same += len(set(x) & set(y))
        total += len(set(y))
    return same / total


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_many_keys_are_weighed_by_the_same_sample(heads: tuple[int, int], causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    k_len, q_len = 6100, 320 if causal else 6100
    q = torch.randn(1, heads[0], q_len, 32, generator=generator)
    k = 2 * torch.randn(1, heads[1], k_len, 32, generator=generator)
    bands = (Band(tile=64, left=64, right=0 if causal else 64),) * heads[1]
    pattern = BlockPattern(causal=causal, bands=bands, block=64)
    request = asked(q, k, pattern, 0.3, sinks=4, budget=32)
    selector = Centroids(rows=4, proposals=4)
    slow = ordered(selector.select(request))
    fast = ordered(selector.select(replace(request, choose_by_bounds=native.choose_by_bounds)))
    assert (fast != slow).any(-1).double().mean() < 0.02
    assert overlap(fast, slow) > 0.999


@pytest.mark.parametrize(
    "selector",
    [
        Centroids(),
        Bounds(),
        Bounds(row_radius=0.0),
        *(Bounds(tree=tree, proposals=1) for tree in (2, 16)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_choices_hold_as_much_mass(dtype: torch.dtype, selector: Bounds) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 4, 1200, 64, generator=generator).to(dtype)
    k, v = (torch.randn(1, 2, 1200, 64, generator=generator).to(dtype) for _ in range(2))
    key_tokens = 32 if selector.tree is None else 8
    attention = MSSwift(
        windows=(128,),
        key_tokens=key_tokens,
        dense_below=128,
        remainder=None,
        selector=selector,
    )
    everything = Full()(2 * q, k, v).lse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "ranking_dtype", ranking_dtype)
        mass = {
            backend: (attention(2 * q, k, v, backend=backend).lse - everything).exp().mean()
            for backend in ("native", "eager")
        }
    assert mass["native"] > mass["eager"] - 1e-3


def test_a_tree_is_descended_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds nearly what a look at every key block finds."""
    q, k, v = torch.randn(3, 1, 2, 3000, 32)

    def attend(tree: int | None) -> Tensor:
        selector = Bounds(tree=tree, proposals=4)
        attention = MSSwift(
            windows=(32,), block=32, key_tokens=8, dense_below=64, selector=selector
        )
        found: Tensor = attention(2 * q, k, v, backend="native").lse
        return found

    everything = attend(None)
    monkeypatch.setattr("longswift.mechanisms.selectors.bounds.BoundsPass", None)
    found = attend(4)
    assert not torch.equal(found, everything)
    assert (found - everything).exp().mean() > 0.9
