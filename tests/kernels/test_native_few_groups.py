"""Deep blocks of few groups share products and keep no ranks: they choose as blocks alone do.

Those that rank bytes are in ``test_native_rounding``, too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import native
from longswift.kernels.native import rounding
from longswift.kernels.native.factors import ranks_in_bytes
from longswift.mechanisms.selectors.base import Request
from longswift.mechanisms.selectors.centroids import Centroids
from tests.kernels.test_native_choosing import agree, asked

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)

WINDOW, BLOCK = 128, 64


def request(
    q: Tensor, k: Tensor, *, budget: int = 32, block: int = BLOCK, sinks: int = 5
) -> Request:
    band = Band(tile=WINDOW, left=0, right=0)
    pattern = BlockPattern(causal=True, bands=(band,) * k.shape[1], block=block)
    return asked(q, k, pattern, q.shape[-1] ** -0.5, sinks=sinks, budget=budget)


def selector(far: int = 256, proposals: int = 8, rows: int = 4) -> Centroids:
    return Centroids(far=far, proposals=proposals, rows=rows)


@settings(max_examples=25)
@given(st.data())
def test_choices(data: st.DataObject) -> None:
    """Some blocks have few groups of rows, those before them more; the last is cut."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k_len = draw(st.integers(4400, 7000))
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    dim = draw(st.sampled_from([16, 32, 64, 80]))
    q_len = draw(st.integers(1, 2500))
    q = torch.randn(1, heads * groups, q_len, dim, generator=generator)
    k = 2 * torch.randn(1, heads, k_len, dim, generator=generator)
    budget, block = draw(st.sampled_from([(1, 64), (32, 64), (64, 128), (500, 64)]))
    asks = request(q, k, budget=budget, block=block, sinks=draw(st.integers(0, 40)))
    agree(selector(draw(st.sampled_from([64, 512, 2048])), draw(st.sampled_from([1, 8]))), asks)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("budget", [4, 25])
def test_a_sample_that_misleads(sampled: bool, budget: int) -> None:
    """What the best keys exceed is guessed from every 16th tile: too high, or far too low."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 1, 640, 32, generator=generator)
    k = torch.randn(1, 1, 8192, 32, generator=generator)
    tiles = torch.arange(8192) // 16
    k[:, :, (tiles % 16 == 0) == sampled] *= 6.0
    agree(selector(), request(q, k, budget=budget))
    # Ranks that rise all the way: every key is among the best when it comes.
    k = k / k.norm(dim=-1, keepdim=True) * torch.linspace(1, 40, 8192)[:, None]
    agree(selector(), request(q, k, budget=budget))


def test_equal_keys() -> None:
    """Of equal ranks the first keys are taken, wherever blocks end."""
    q = torch.randn(1, 1, 2000, 32)
    k = torch.randn(1, 1, 40, 32).repeat(1, 1, 150, 1)
    asks = request(q, k, budget=16)
    choose = native.choose_by_bounds
    whole = selector().select(replace(asks, choose_by_bounds=choose)).tokens
    for rows in (64, 1000):
        part = request(q[:, :, -rows:], k, budget=16)
        few = selector().select(replace(part, choose_by_bounds=choose)).tokens
        assert torch.equal(few[:, :, -1], whole[:, :, -1])


@pytest.mark.parametrize("bytes_too", [False, True])
def test_later_queries_move_nothing(bytes_too: bool) -> None:
    """Blocks that share a tile know nothing of each other."""
    if bytes_too and not ranks_in_bytes():
        pytest.skip("no unit that multiplies bytes")
    q, k = torch.randn(1, 2, 3000, 64), 2 * torch.randn(1, 2, 7000, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "ranks_in_bytes", lambda: bytes_too)

        def chosen(q: Tensor, k: Tensor) -> Tensor:
            asks = replace(request(q, k), choose_by_bounds=native.choose_by_bounds)
            return selector().select(asks).tokens

        before = chosen(q, k)
        q, k = q.clone(), k.clone()
        q[:, :, 2000:] *= 50
        k[:, :, 6000:] *= 50
        after = chosen(q, k)
    same = (6000 - (7000 - 3000)) // BLOCK
    assert torch.equal(before[:, :, :same], after[:, :, :same])
    assert not torch.equal(before, after)
