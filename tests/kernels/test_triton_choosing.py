"""Key tokens chosen by Triton's kernels, in its interpreter, against the eager choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import eager, triton
from longswift.mechanisms.selectors.base import Request
from longswift.mechanisms.selectors.bounds import Bounds
from longswift.mechanisms.selectors.centroids import Centroids

pytest.importorskip("triton", reason="triton is not installed")
from longswift.kernels.triton import choosing  # noqa: E402

RUNS, WHY = triton.verify(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
if not RUNS or torch.cuda.is_available():
    pytest.skip(WHY, allow_module_level=True)


def asked(
    q: Tensor,
    k: Tensor,
    *,
    block: int = 16,
    left: int = 8,
    causal: bool = True,
    sinks: int = 3,
    budget: int = 8,
    strict: bool = False,
) -> Request:
    """A request of blocks that see themselves and ``left`` keys beside them."""
    bands = tuple(
        Band(tile=block * (1 + h), left=left, right=0 if causal else left)
        for h in range(k.shape[1])
    )
    pattern = BlockPattern(causal=causal, bands=bands, block=block)
    return Request(
        q=q,
        k=k,
        scale=0.3,
        key_block=4,
        pattern=pattern,
        band_lse=eager.attend_bands(q, k, k, pattern, 0.3).lse,
        sinks=sinks,
        budget=budget,
        coverage=None,
        strict=strict,
    )


def selector(rows: int = 4, far: int = 65_536, proposals: int = 3) -> Centroids:
    return Centroids(rows=rows, far=far, proposals=proposals, most_proposals=proposals)


def agree(chooser: Bounds, request: Request, least: float = 1.0) -> None:
    """Of each block's tokens at least this share are the same, and they come in order."""
    slow = chooser.select(request).tokens.sort(-1).values
    fast = chooser.select(replace(request, choose_by_bounds=triton.choose_by_bounds)).tokens
    for tokens in fast.flatten(0, 2):
        real = tokens[tokens >= 0].tolist()
        assert real == sorted(set(real))
    fast = fast.sort(-1).values
    assert torch.equal(fast >= 0, slow >= 0)
    same = [
        len({*a.tolist()} & {*b.tolist()}) / len({*a.tolist()})
        for a, b in zip(fast.flatten(0, 2), slow.flatten(0, 2), strict=True)
    ]
    assert sum(same) >= least * len(same)


@settings(max_examples=6)
@given(st.data())
def test_choices(data: st.DataObject) -> None:
    """Cut blocks, grouped heads, both directions, odd numbers of rows and any dtype."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    groups = draw(st.sampled_from([groups, 3]))
    causal = draw(st.booleans())
    k_len = draw(st.integers(17, 70))
    q_len = draw(st.integers(2, k_len)) if causal else k_len
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
    dim = draw(st.sampled_from([8, 24, 32]))
    q = torch.randn(batch, q_len, kv_heads * groups, dim, generator=generator).transpose(1, 2)
    k = 2 * torch.randn(batch, kv_heads, k_len, dim, generator=generator)
    request = asked(
        q.to(dtype),
        k.to(dtype),
        block=draw(st.sampled_from([16, 32])),
        left=draw(st.integers(0, 4)) * 4,
        causal=causal,
        sinks=draw(st.integers(0, 9)),
        budget=draw(st.sampled_from([1, 7, 16])),
    )
    rows, far = draw(st.sampled_from([1, 3, 8, 64])), draw(st.sampled_from([50, 1000]))
    # Proposals whose ranks agree in 16 bits may be others.
    agree(selector(rows, far, draw(st.sampled_from([1, 2, 50]))), request, 0.75)


def test_a_sample_stands_for_many_keys() -> None:
    q, k = torch.randn(1, 1, 40, 16), 2 * torch.randn(1, 1, 4200, 16)
    agree(selector(), asked(q, k), 0.9)


@pytest.mark.parametrize("causal", [True, False])
def test_ranks_of_eight_bits(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """A channel far larger than the others does not drown what they say."""
    monkeypatch.setattr(choosing, "_ranks_in_fp8", lambda device: True)
    q, k = torch.randn(1, 2, 80, 32), torch.randn(1, 1, 400, 32)
    k[..., 3] += 60.0
    q = q if causal else torch.randn(1, 2, 400, 32)
    request = asked(q.half(), k.half(), block=64, causal=causal, budget=32)
    agree(selector(), request, 0.85)


def test_more_centroids_than_a_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = choosing.Tile(16, 16, 4, 2)
    monkeypatch.setitem(choosing._TILES, "rank_keys", (tile, tile, tile))
    agree(selector(1), asked(torch.randn(1, 2, 64, 16), 2 * torch.randn(1, 1, 100, 16)), 0.97)


def test_runs_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen for a few blocks at a time, the tokens are the same."""
    q, k = torch.randn(2, 2, 160, 16), 2 * torch.randn(2, 1, 160, 16)
    request = replace(asked(q, k), choose_by_bounds=triton.choose_by_bounds)
    whole = selector(far=64).select(request).tokens
    monkeypatch.setattr(choosing, "_RANKS", 2000)
    assert torch.equal(selector(far=64).select(request).tokens, whole)


def test_equal_keys() -> None:
    """Of equal ranks the first are taken."""
    q, k = torch.randn(1, 1, 96, 16), torch.randn(1, 1, 1, 16).expand(1, 1, 96, 16)
    request = asked(q, k, left=0, budget=6)
    tokens = (
        selector(proposals=1)
        .select(replace(request, choose_by_bounds=triton.choose_by_bounds))
        .tokens
    )
    assert tokens[0, 0, 2:].tolist() == [[3, 4, 5, 6, 7, 8]] * 4


def test_numbers_that_are_none() -> None:
    """Blocks that see one choose something, those before it what they would have chosen."""
    q, k = torch.randn(1, 2, 96, 16), 2 * torch.randn(1, 1, 96, 16)
    request = replace(asked(q, k), choose_by_bounds=triton.choose_by_bounds)
    before = selector().select(request).tokens
    q[:, :, 70], k[:, :, 75] = torch.nan, torch.nan
    after = selector().select(replace(request, q=q, k=k)).tokens
    assert torch.equal(after[:, :, :4], before[:, :, :4])
    assert bool((after >= -1).all()) and bool((after < 96).all())


def test_what_is_left_to_torch() -> None:
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
    for chooser, request in (
        (selector(), asked(q, k, strict=True)),
        (selector(), asked(q[:, :, -1:], k)),
        (Bounds(), asked(q, k)),
    ):
        expected = chooser.select(request).tokens
        given_kernels = replace(request, choose_by_bounds=triton.choose_by_bounds)
        assert torch.equal(chooser.select(given_kernels).tokens, expected)
