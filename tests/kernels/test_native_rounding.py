"""Keys ranked as bytes: exact where rounding loses nothing, and elsewhere nearly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, MSSwift
from longswift.core import compiled
from longswift.core.pattern import Band, BlockPattern
from longswift.kernels import native
from longswift.kernels.native import rounding
from longswift.kernels.native.factors import ranks_in_bytes
from longswift.kernels.native.rounding import RoundedKeys
from longswift.mechanisms.selectors.centroids import Centroids
from tests.kernels.test_native_choosing import asked

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(not RUNS, reason=WHY),
    pytest.mark.skipif(not (RUNS and ranks_in_bytes()), reason="no unit that multiplies bytes"),
]


@pytest.fixture(autouse=True)
def in_bytes(exact_ranks: None) -> Iterator[None]:
    """As outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "ranks_in_bytes", lambda: True)
        yield


def levels_of(q: Tensor, k: Tensor, scale: float | None = None) -> list[int]:
    """The levels at which blocks of 64 queries choose among the keys before their own 128."""
    length = k.shape[2]
    pattern = BlockPattern(
        causal=True, bands=(Band(tile=128, left=0, right=0),) * k.shape[1], block=64
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    request = asked(q, k, pattern, scale, sinks=0, budget=4)
    (run,) = [run for run in request.runs(2) if run.rows == 64]
    assert length % 64 == 0
    rounded = RoundedKeys(k)
    found = {}
    for work, _, levels in rounded.phases(q, run, request.edges, pattern, request.scale):
        found |= {(b, h, n): int(levels[b, h, n]) for b, h, f, c in work for n in range(f, f + c)}
    return [found[key] for key in sorted(found)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([32, 64, 80, 128, 200]),
    # From some 4,300 tokens on blocks of few groups are ranked together.
    st.integers(0, 700) | st.integers(4300, 4900),
    st.booleans(),
    st.sampled_from([1, 20, 64]),
    st.sampled_from([1, 4, 64]),
)
def test_whole_numbers_lose_nothing(
    seed: int,
    batch: int,
    groups: int,
    dim: int,
    more: int,
    causal: bool,
    budget: int,
    rows: int,
) -> None:
    """Where all rows of a block are one, of whole numbers, the keys of the largest scores win."""
    generator = torch.Generator().manual_seed(seed)
    length, block, left = 200 + more, 32, 32

    def numbers(count: int) -> Tensor:
        x = torch.randint(-127, 128, (batch, 2, count, dim), generator=generator).float()
        # Every block and every prefix reach as far as bytes do.
        x[..., 0] = 127.0
        return x

    k = numbers(length)
    of_blocks = numbers(-(-length // block))
    q = of_blocks.repeat_interleave(block, 2)[:, :, :length].repeat_interleave(groups, 1)
    band = Band(tile=2 * block, left=left, right=0 if causal else left)
    pattern = BlockPattern(causal=causal, bands=(band, band), block=block)
    scale = 0.5 / 127 / dim**0.5
    request = asked(q, k, pattern, scale, sinks=3, budget=budget)
    request = replace(request, choose_by_bounds=native.choose_by_bounds)
    found = Centroids(rows=rows, proposals=3).select(request).tokens
    for n, row in enumerate(of_blocks.unbind(2)):
        if length - n * block < 2:
            # A single row is bounded.
            continue
        scores = (k @ row.unsqueeze(-1)).squeeze(-1)
        position = torch.arange(length)
        first, end = request.edges[0, n].tolist()
        inside = (position >= first) & (position < end) if not causal else position >= first
        scores[:, :, inside | (position < 3)] = -torch.inf
        most = min(budget, int(scores[0, 0].isfinite().sum()))
        best = scores.topk(most).values
        chosen = found[:, :, n].long()
        assert ((chosen >= 0).sum(-1) == most).all()
        taken = scores.gather(2, chosen.clamp(min=0)).masked_fill(chosen < 0, -torch.inf)
        assert torch.equal(taken.sort(descending=True).values[..., :most], best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_bytes_hold_as_much_mass(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    q = 2 * torch.randn(1, heads[0], 1500, dim)
    k, v = torch.randn(2, 1, heads[1], 1500, dim)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    attention = MSSwift(windows=(128,), key_tokens=32, dense_below=128, remainder=None)
    everything = Full()(q, k, v).lse
    mass = {
        backend: (attention(q, k, v, backend=backend).lse - everything).exp().mean()
        for backend in ("native", "eager")
    }
    assert mass["native"] > mass["eager"] - 2e-3


def test_a_choice_depends_on_no_later_key() -> None:
    """Not even on one that is far larger, and would set another step."""
    attention = MSSwift(windows=(128,), key_tokens=16, dense_below=128)
    q, k, v = torch.randn(3, 1, 2, 1300, 64)
    before = attention(q, k, v, backend="native").out
    q[:, :, 1000:] *= 5.0
    k[:, :, 1000:] *= 30.0
    v[:, :, 1000:] = 0.0
    after = attention(q, k, v, backend="native").out
    # Blocks of 128 queries choose together.
    torch.testing.assert_close(after[:, :, :896], before[:, :, :896], rtol=0, atol=0)
    assert not torch.equal(after[:, :, 1000:], before[:, :, 1000:])


def test_chunks_choose_as_one_call_does() -> None:
    attention = MSSwift(windows=(128,), key_tokens=16, dense_below=128)
    q, k, v = torch.randn(3, 2, 2, 1024, 64)
    k *= torch.linspace(0.2, 4.0, 1024)[:, None]
    whole = attention(q, k, v, backend="native").out
    for end in (384, 640, 1024):
        chunk = attention(
            q[:, :, end - 256 : end], k[:, :, :end], v[:, :, :end], backend="native"
        ).out
        torch.testing.assert_close(chunk, whole[:, :, end - 256 : end])


def test_rows_and_heads_have_steps_of_their_own() -> None:
    attention = MSSwift(windows=(128,), key_tokens=16, dense_below=128)
    q, k, v = torch.randn(3, 2, 4, 1000, 64)
    k *= torch.tensor([1.0, 20.0]).view(2, 1, 1, 1) * torch.tensor([1.0, 9.0, 0.1, 3.0]).view(
        4, 1, 1
    )
    together = attention(q, k, v, backend="native").out
    for b in range(2):
        for h in range(4):
            alone = attention(*(x[b : b + 1, h : h + 1] for x in (q, k, v)), backend="native").out
            torch.testing.assert_close(alone[0, 0], together[b, h])


def test_the_step_follows_the_largest_key_so_far() -> None:
    q, k = torch.randn(2, 1, 1, 1024, 64).clamp(-3.0, 3.0)
    k[0, 0, 0, 0], k[0, 0, 500, 7] = 127.0 / 16, -127.0
    found = levels_of(q, k, 1e-3)
    # Key 500 is before the window of the blocks from position 512 on.
    few = [level for level in found if level != rounding.NO_BYTES]
    assert set(few) == {-16, 0}
    assert found.index(0) == 8


def test_one_large_channel_is_not_rounded_away() -> None:
    """Scores differ by what a step would swallow: such keys keep their 16 bits."""
    q, k, v = torch.randn(3, 1, 2, 1280, 64)
    k[..., 3] += 500.0
    q[..., 3] *= 0.01
    assert set(levels_of(q, k)) == {rounding.NO_BYTES}
    attention = MSSwift(windows=(128,), key_tokens=32, dense_below=128, remainder=None)
    found = attention(q, k, v, backend="native").lse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "ranks_in_bytes", lambda: False)
        torch.testing.assert_close(found, attention(q, k, v, backend="native").lse, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-12, 1e3])
@pytest.mark.parametrize("of_keys", [0.0, 1e-30, 1.0, 1e4])
def test_unusual_sizes(scale: float, of_keys: float) -> None:
    """Nothing overflows, and the choice holds what the eager backend's holds."""
    q, k, v = torch.randn(3, 1, 2, 1000, 64)
    k *= of_keys
    attention = MSSwift(windows=(128,), key_tokens=16, dense_below=128, remainder=None)
    fast, slow = (attention(q, k, v, scale=scale, backend=b).lse for b in ("native", "eager"))
    assert fast.isfinite().all()
    share = (fast - slow).double() / slow.double().abs().clamp(min=1.0)
    assert share.mean() > -1e-2


def test_without_the_unit_nothing_is_rounded() -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("expected no rounding")

    class Operators:
        def __getattr__(self, name: str) -> object:
            return refuse if name in ("find_levels", "round_keys") else getattr(loaded, name)

    loaded = compiled.loaded()
    q, k, v = torch.randn(3, 1, 1, 600, 64)
    attention = MSSwift(windows=(128,), key_tokens=16, dense_below=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding.compiled, "loaded", Operators)
        with pytest.raises(AssertionError, match="no rounding"):
            attention(q, k, v, backend="native")
        patch.setattr(rounding, "ranks_in_bytes", lambda: False)
        attention(q, k, v, backend="native")
