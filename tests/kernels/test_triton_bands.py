"""The kernel of bands alone, and PyTorch's operators for full attention, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import MSSwift
from longswift.core.pattern import Band, BlockPattern
from longswift.core.types import Partial
from longswift.kernels import reference, triton
from longswift.mechanisms.patterned import full_pattern
from tests.kernels.test_patterns import CLOSE, Problem, problems

pytest.importorskip("triton", reason="triton is not installed")
from longswift.kernels.triton import bands as lean  # noqa: E402
from longswift.kernels.triton import whole  # noqa: E402

RUNS, WHY = triton.verify(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
if not RUNS:
    pytest.skip(WHY, allow_module_level=True)


def room(q: Tensor, v: Tensor) -> Partial:
    """Views whose channels and rows alone are neighbours, for the results of q and v."""
    batch, heads, q_len, _ = q.shape
    out = torch.empty(batch, q_len + 3, heads + 1, v.shape[3] + 5, dtype=q.dtype)
    lse = torch.empty(
        batch, heads + 2, q_len + 7, dtype=torch.float64 if q.dtype == torch.float64 else None
    )
    return Partial(out[:, 3:, :heads, : v.shape[3]].transpose(1, 2), lse[:, :heads, 4 : 4 + q_len])


def close(found: Partial, problem: Problem, rtol: float, atol: float) -> None:
    double = [x.double() for x in problem.tensors]
    right = reference.attend_bands(*double, problem.pattern, problem.scale)  # type: ignore[arg-type]
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.fixture(params=[False, True], ids=["loads", "descriptors"])
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps, so that a band has many, fetched either way."""
    small = lean.Cut(lines=32, keys=16, warps=4, stages=2, described=request.param)
    monkeypatch.setattr(lean, "CUTS", dict.fromkeys(lean.CUTS, small))


@settings(max_examples=25)
@given(problems(longest=90), st.sampled_from([16, 32, 128]), st.booleans())
def test_bands(problem: Problem, lines: int, places: bool) -> None:
    bands = tuple(replace(band, reach=None) for band in problem.pattern.bands)
    problem = replace(problem, pattern=replace(problem.pattern, bands=bands))
    into = room(problem.q, problem.v) if places else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "CUTS", dict.fromkeys(lean.CUTS, lean.Cut(lines, 16, 4, 2)))
        found = triton.attend_bands(*problem.tensors, problem.pattern, problem.scale, into=into)
    assert into is None or found is into
    close(found, problem, **CLOSE)


@settings(max_examples=8)
@given(problems(longest=40))
def test_what_the_kernel_does_not_take_is_written_to_its_place_too(problem: Problem) -> None:
    """Bands with a reach, and scales that are not above 0."""
    for scale in (problem.scale, -0.25, 0.0):
        into = room(problem.q, problem.v)
        found = triton.attend_bands(*problem.tensors, problem.pattern, scale, into=into)
        assert found is into
        close(found, replace(problem, scale=scale), **CLOSE)


@pytest.mark.usefixtures("cuts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "bands",
    [
        (Band(tile=300, left=300, right=300),) * 2,
        (Band(tile=64, left=32), Band(tile=32, left=96, right=11)),
        (Band(tile=48, left=20, right=5), Band(tile=7, left=0, right=-7)),
    ],
    ids=["whole", "aligned", "straddling"],
)
@pytest.mark.parametrize("q_len", [70, 33, 1])
def test_shapes(
    bands: tuple[Band, ...], causal: bool, groups: int, dtype: torch.dtype, q_len: int
) -> None:
    """Heads of 32 and 16 channels, as in a model; fewer queries than keys."""
    shapes = (2, 2 * groups, q_len, 32), (2, 2, 70, 32), (2, 2, 70, 16)
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    pattern = BlockPattern(causal=causal, bands=bands)
    problem = Problem(pattern=pattern, q=q, k=k, v=v, scale=0.2)
    atol = 1e-5 if dtype == torch.float32 else 2e-3
    found = triton.attend_bands(q, k, v, pattern, 0.2)
    assert found.out.dtype == torch.float32
    close(found, problem, rtol=1e-5, atol=atol)
    into = room(q, v)
    assert triton.attend_bands(q, k, v, pattern, 0.2, into=into) is into
    close(into, problem, rtol=1e-3, atol=atol)


def test_more_queries_than_keys() -> None:
    """Cross attention: the first queries lie before position 0."""
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, 90), (2, 50), (2, 50)))
    for pattern in (
        full_pattern(50, 2, causal=False, q_len=90),
        BlockPattern(causal=False, bands=(Band(tile=16, left=8, right=8),) * 2),
    ):
        problem = Problem(pattern=pattern, q=q, k=k, v=v, scale=0.3)
        close(triton.attend_bands(q, k, v, pattern, 0.3), problem, rtol=1e-5, atol=1e-5)


def test_the_result_replaces_the_bands() -> None:
    q, k, v = (torch.randn(1, h, 60, 16).half() for h in (4, 2, 2))
    tokens = torch.tensor([[-1, -1], [3, -1], [0, 9], [1, 2]]).expand(1, 2, -1, -1)
    bands = (Band(tile=16, left=0), Band(tile=16, left=0))
    for pool in (None, 16):
        pattern = BlockPattern(
            causal=True, bands=bands, block=16, tokens=tokens, pool=pool, pool_grain=16
        )
        into = room(q, v)
        bare = triton.attend_bands(q, k, v, pattern, 0.3, into=into)
        found = triton.attend(q, k, v, pattern, 0.3, bands=bare)
        assert found is into
        right = reference.attend(q.double(), k.double(), v.double(), pattern, 0.3)
        for got, expected in zip(found, right, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-3)
    # Without anything else to see, they are the result; sums of another dtype are not.
    alone = BlockPattern(causal=True, bands=bands)
    assert triton.attend(q, k, v, alone, 0.3, bands=into) is into
    sums = triton.attend_bands(q, k, v, alone, 0.3)
    assert triton.attend(q, k, v, alone, 0.3, bands=sums).out.dtype == torch.float16


@pytest.mark.parametrize("remainder", [None, 32])
def test_rows_computed_exactly_and_the_rest_share_memory(remainder: int | None) -> None:
    mechanism = MSSwift(
        windows=(16, 64), block=16, sinks=3, key_tokens=16, dense_below=32, remainder=remainder
    )
    q, k, v = (torch.randn(1, heads, 150, 16) for heads in (4, 2, 2))
    fast, slow = (mechanism(q, k, v, causal=True, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(fast.out, slow.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.lse, slow.lse, rtol=1e-4, atol=1e-5)


def test_lengths_beyond_the_kernels_integers_are_not_taken() -> None:
    assert lean.takes((Band(tile=64, left=1 << 40),), 0.3, 1, 1 << 20)
    assert not lean.takes((Band(tile=64, left=0),), 0.3, 1, 1 << 30)
    assert not lean.takes((Band(tile=1 << 30, left=0),), 0.3, 1, 1 << 20)
    assert not lean.takes((Band(tile=64, left=0, reach=(4, 0)),), 0.3, 1, 1 << 20)


@settings(max_examples=60)
@given(st.data())
def test_whole_patterns_are_recognised(data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    k_len = data.draw(st.integers(1, 40))
    q_len = data.draw(st.integers(1, k_len if causal else 60))
    sizes = st.integers(1, 50), st.integers(0, 50), st.integers(-8, 50)
    band = Band(**dict(zip(("tile", "left", "right"), map(data.draw, sizes), strict=True)))
    pattern = BlockPattern(causal=causal, bands=(band,))
    sees = pattern.visible(q_len, k_len, 1, torch.device("cpu"))
    full = full_pattern(k_len, 1, causal, q_len=q_len)
    everything = full.visible(q_len, k_len, 1, torch.device("cpu"))
    assert whole.is_whole(full, q_len, k_len)
    if whole.is_whole(pattern, q_len, k_len):
        assert torch.equal(sees, everything)
    elif band.right >= 0:
        assert not torch.equal(sees, everything)


def right(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    """What an operator should give, with a log-sum-exp of cuDNN's shape."""
    pattern = full_pattern(k.shape[2], k.shape[1], causal, q_len=q.shape[2])
    out, lse = reference.attend(q, k, v, pattern, scale)
    return Partial(out, lse.unsqueeze(3))


def in_bits(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    out, lse = right(q, k, v, causal, scale)
    return Partial(out, lse / 0.6931471805599453)


def unaware_of_scale(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    return right(q, k, v, causal, q.shape[3] ** -0.5)


def equal_heads(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    """Refuses groups; rounds rows of the log-sum-exp up, as the memory-efficient one does."""
    if q.shape[1] != k.shape[1]:
        raise RuntimeError("heads differ")
    out, lse = right(q, k, v, causal, scale)
    return Partial(out, torch.nn.functional.pad(lse[..., 0], (0, -q.shape[2] % 32)))


def broken(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    out, lse = right(q, k, v, causal, scale)
    return Partial(out * float("nan"), lse)


@pytest.fixture
def forget() -> Iterator[None]:
    """Operators are judged anew."""
    whole.objection.cache_clear()
    yield
    whole.objection.cache_clear()


HEADS = whole.Heads(torch.device("cpu"), torch.float16, 16, 8, 3)
PROBLEM = [(2, 6, 40, 16), (2, 2, 40, 16), (2, 2, 40, 8)]


@pytest.mark.usefixtures("forget")
def test_wrong_operators_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "in bits": in_bits,
        "unaware of scale": unaware_of_scale,
        "equal heads": equal_heads,
        "broken": broken,
    }
    good = {"equal heads, by group": whole.by_group(equal_heads), "never asked": broken}
    monkeypatch.setattr(whole, "OPERATORS", {**wrong, **good})
    q, k, v = (torch.randn(shape).half() for shape in PROBLEM)
    for causal in (True, False):
        found = whole.attend(q, k, v, causal, 0.3)
        assert found is not None and found.lse.dtype == torch.float32
        out, lse = right(q.float(), k.float(), v.float(), causal, 0.3)
        torch.testing.assert_close(found.out.float(), out, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.lse, lse[..., 0], rtol=1e-5, atol=1e-5)
    reasons = [whole.objection(name, HEADS) or "" for name in wrong]
    for reason, part in zip(reasons, ["log-sum-exp", "output", "heads differ", "nan"], strict=True):
        assert part in reason
    assert whole.objection.cache_info().misses == len(wrong) + 1


@pytest.mark.usefixtures("forget")
def test_an_operator_that_fails_later_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_more(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
        if k.shape[2] > 150:
            raise RuntimeError("too many keys")
        return right(q, k, v, causal, scale)

    def full(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
        if k.shape[2] > 150:
            raise torch.OutOfMemoryError("no memory")
        return right(q, k, v, causal, scale)

    monkeypatch.setattr(whole, "OPERATORS", {"fails": fails_on_more})
    q, k, v = (torch.randn(1, 2, 160, 16) for _ in range(3))
    with pytest.warns(UserWarning, match="fails is passed over: RuntimeError: too many keys"):
        assert whole.attend(q, k, v, True, 0.3) is None
    monkeypatch.setattr(whole, "OPERATORS", {"full": full})
    with pytest.raises(torch.OutOfMemoryError):
        whole.attend(q, k, v, True, 0.3)


@pytest.mark.usefixtures("forget")
def test_what_operators_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than keys with a causal mask, unaligned inputs, plans for a few rows."""
    monkeypatch.setattr(whole, "OPERATORS", {"right": right})
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    assert whole.attend(q[:, :, :30], k, v, True, 0.3) is None
    assert whole.attend(q[:, :, :30], k, v, False, 0.3) is not None
    # A single query sees everything.
    last = whole.attend(q[:, :, -1:], k, v, True, 0.3)
    assert last is not None
    torch.testing.assert_close(last.out, right(q, k, v, True, 0.3).out[:, :, -1:])
    assert whole.attend(*(torch.randn(1, 2, 40, 12) for _ in range(3)), True, 0.3) is None
    assert whole.attend(q, k, torch.randn(1, 2, 40, 17)[..., 1:], True, 0.3) is None
    monkeypatch.setattr(whole, "OPERATORS", {"cudnn": right})
    assert whole.attend(q, k, v, True, 0.3) is None
    monkeypatch.setattr(whole, "_WORTH_A_PLAN", 40)
    assert whole.attend(q, k, v, True, 0.3) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they may work")
@pytest.mark.usefixtures("forget")
def test_no_operator_works_where_there_is_no_gpu() -> None:
    q, k, v = (torch.randn(1, 2, 2048, 16) for _ in range(3))
    assert whole.attend(q, k, v, True, 0.3) is None
    heads = whole.Heads(q.device, q.dtype, 16, 16, 1)
    assert all(whole.objection(name, heads) for name in whole.OPERATORS)
