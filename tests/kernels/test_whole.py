"""Full attention by the compiled kernels, and the short way of a call to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longswift import Full, InputError, MSSwift
from longswift.core.mechanism import Mechanism
from longswift.core.observe import Observed, observe
from longswift.core.pattern import BlockPattern
from longswift.core.rectangles import is_whole
from longswift.core.summary import KeySummary
from longswift.core.types import AttentionResult
from longswift.kernels import dispatch, eager, native, reference
from longswift.kernels.native import whole
from longswift.kernels.native.whole import attend_by_rows, attend_whole
from longswift.mechanisms.patterned import full_pattern

RUNS, WHY = native.verify(torch.device("cpu"))
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = tuple[Tensor, Tensor, Tensor]


def made(
    q_len: int,
    k_len: int,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    width: int = 32,
    value_width: int = 32,
    layout: str = "dense",
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def new(heads: int, length: int, width: int) -> Tensor:
        if layout == "by token":
            return torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)
        if layout == "cut":
            wide = torch.randn(batch, heads, length + 3, width + 16, generator=generator)
            return wide[:, :, 2:-1, :width]
        return torch.randn(batch, heads, length, width, generator=generator)

    sizes = (heads * groups, q_len, width), (heads, k_len, width), (heads, k_len, value_width)
    q, k, v = (new(*size) for size in sizes)
    return q, k, v


def agrees(inputs: Inputs, causal: bool, scale: float) -> None:
    """At most twice as far from fp64 as the eager kernel, for the same rounded inputs."""
    q, k, v = inputs
    pattern = full_pattern(k.shape[2], k.shape[1], causal, q_len=q.shape[2])
    exact = reference.attend(*(x.double() for x in inputs), pattern, scale)
    plain = eager.attend(*inputs, pattern, scale)
    found = attend_whole(*inputs, causal=causal, scale=scale)
    assert found is not None
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    # Few rows may be luckier than a rounding of their largest score allows.
    longest = [float(x.float().norm(dim=3).max()) for x in (q, k)]
    unit = torch.finfo(q.dtype).eps * (1 + scale * longest[0] * longest[1])
    units = (unit * max(1.0, float(x.abs().max())) for x in (v, exact.lse))
    for ours, theirs, right, one in zip(found, plain, exact, units, strict=True):
        off = (ours.double() - right).abs().max()
        assert off <= 2 * (theirs.double() - right).abs().max() + one


@settings(max_examples=150)
@given(st.data())
def test_forward(data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    k_len = data.draw(st.integers(1, 700))
    q_len = data.draw(st.integers(1, k_len if causal else 700))
    inputs = made(
        q_len,
        k_len,
        batch=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, 3)),
        groups=data.draw(st.integers(1, 3)),
        width=data.draw(st.sampled_from([16, 32, 48, 64, 96, 128])),
        value_width=data.draw(st.sampled_from([16, 32, 64, 80])),
        layout=data.draw(st.sampled_from(["dense", "by token", "cut"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k, v = (x if dtype == torch.float32 else x.to(dtype) for x in inputs)
    agrees((q, k, v), causal, data.draw(st.sampled_from([0.05, 0.3, 2.0])))


@pytest.mark.parametrize("q_len,k_len", [(1100, 1100), (32, 2100), (40, 8192)])
def test_many_panels_and_more_keys_than_are_packed_at_once(q_len: int, k_len: int) -> None:
    agrees(made(q_len, k_len, heads=3, width=128, value_width=128), True, 0.1)


@settings(max_examples=100)
@given(st.data())
def test_few_rows(data: st.DataObject) -> None:
    """Keys are read where they lie, in pieces, by 16 rows of a group at a time."""
    causal = data.draw(st.booleans())
    k_len = data.draw(st.sampled_from([1, 15, 127, 129, 1023, 1024, 1025, 1030, 2600, 5000]))
    inputs = made(
        data.draw(st.sampled_from([1, 2, 3, 7, 8, 15, 23, 24])) if not causal or k_len > 23 else 1,
        k_len,
        batch=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, 3)),
        groups=data.draw(st.sampled_from([1, 2, 3, 4, 7, 16, 17])),
        width=data.draw(st.sampled_from([16, 32, 48, 64, 128])),
        value_width=data.draw(st.sampled_from([16, 32, 64, 80])),
        layout=data.draw(st.sampled_from(["dense", "by token", "cut"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k, v = (x if dtype == torch.float32 else x.to(dtype) for x in inputs)
    scale = data.draw(st.sampled_from([0.05, 0.3, 2.0]))
    agrees((q, k, v), causal, scale)
    batched = attend_whole(q, k, v, causal=causal, scale=scale)
    alone = attend_whole(q[-1:], k[-1:], v[-1:], causal=causal, scale=scale)
    assert batched is not None and alone is not None
    assert torch.equal(batched[0][-1:], alone[0]) and torch.equal(batched[1][-1:], alone[1])


@pytest.mark.parametrize("rows", [1, 7])
def test_no_number_of_threads_changes_few_rows(rows: int) -> None:
    inputs = made(rows, 5000, heads=2, groups=4, width=64)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend_whole(*inputs, causal=True, scale=0.3))
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None
    for other in found[1:]:
        assert other is not None and torch.equal(other[0], found[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_single_ones(dtype: torch.dtype) -> None:
    """What later keys hold moves no bit of a row; tokens checked together are those decoded."""
    q, k, v = (x.to(dtype) for x in made(6, 1027, heads=2, groups=3, width=64, value_width=64))
    together = attend_whole(q, k, v, causal=True, scale=0.3)
    assert together is not None
    for row in range(6):
        end = 1022 + row
        inputs = q[:, :, row : row + 1], k[:, :, :end], v[:, :, :end]
        alone = attend_whole(*inputs, causal=True, scale=0.3)
        assert alone is not None
        for found, expected in zip(together, alone, strict=True):
            if isinstance(expected, Tensor):
                rounding = 4 * torch.finfo(expected.dtype).eps
                part = found[:, :, row : row + 1]
                torch.testing.assert_close(part, expected, rtol=rounding, atol=rounding)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 1024:] = 3.0
    changed_v[:, :, 1024:] = -7.0
    changed = attend_whole(q, changed_k, changed_v, causal=True, scale=0.3)
    assert changed is not None
    assert torch.equal(changed[0][:, :, :3], together[0][:, :, :3])
    assert not torch.equal(changed[0][:, :, 3:], together[0][:, :, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 48])
def test_scores_that_rise_and_fall_along_the_keys(dtype: torch.dtype, width: int) -> None:
    """What has been summed so far shrinks to nothing beside what comes, or the other way round."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.linspace(-1, 1, 300)[:, None]
    direction = torch.randn(width, generator=generator)
    for sign in (1.0, -1.0):
        k = (sign * steps * direction + 0.1 * torch.randn(300, width, generator=generator))[None]
        v = torch.randn(1, 1, 300, width, generator=generator)
        q = (direction + 0.1 * torch.randn(300, width, generator=generator))[None, None]
        q, k, v = (x.to(dtype) for x in (q, k[None], v))
        for causal in (True, False):
            agrees((q, k, v), causal, 3.0)
        # Of more keys, so that pieces differ as much.
        for rows in (1, 5):
            agrees((q[:, :, -rows:], *(x.repeat_interleave(8, 2) for x in (k, v))), True, 3.0)


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_SCORES", 1 << 16)
    monkeypatch.setattr(whole, "_FEWEST", 64)
    for q_len, causal in ((700, True), (500, True), (700, False)):
        q, k, v = made(q_len, 700, batch=2, groups=2, width=64, value_width=32)
        for dtype in DTYPES:
            inputs = q.to(dtype), k.to(dtype), v.to(dtype)
            once = attend_whole(*inputs, causal=causal, scale=0.2)
            pieces = attend_by_rows(*inputs, causal=causal, scale=0.2)
            assert once is not None and pieces is not None
            atol = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(pieces.out, once[0], rtol=0, atol=atol)
            torch.testing.assert_close(pieces.lse, once[1], rtol=1e-5, atol=1e-5)
        k[1, 1, 5, 3] = torch.inf
        assert attend_by_rows(q, k, v, causal=causal, scale=0.2) is None


@pytest.mark.parametrize("dtype,atol", [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)])
def test_more_keys_than_others_take(dtype: torch.dtype, atol: float) -> None:
    """Some processors multiply so fast that packing many keys is worth it."""
    q, k, v = (x.to(dtype) for x in made(9000, 9000, heads=1, width=64, value_width=64))
    result = Full()(q, k, v, causal=True)
    rows = torch.arange(0, 9000, 321)
    scores = (q[0, 0, rows].double() @ k[0, 0].double().T) * 64**-0.5
    scores.masked_fill_(torch.arange(9000) > rows[:, None], -torch.inf)
    exact = scores.softmax(-1) @ v[0, 0].double()
    torch.testing.assert_close(result.out[0, 0, rows].double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(
        result.lse[0, 0, rows].double(), scores.logsumexp(-1), rtol=0, atol=max(atol / 4, 1e-5)
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_work_and_change_nothing(threads: int) -> None:
    """Heads may be whole pieces of work, or the rows of all of them."""
    for length in (200, 900):
        q, k, v = made(length, length, heads=4, groups=2)
        before = torch.get_num_threads()
        results = []
        try:
            for count in (1, threads):
                torch.set_num_threads(count)
                results.append(attend_whole(q, k, v, causal=True, scale=0.2))
        finally:
            torch.set_num_threads(before)
        alone, shared = results
        assert alone is not None and shared is not None
        assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])


def test_scores_beyond_every_number_are_not_hidden() -> None:
    q, k, v = made(64, 64)
    q, k = q * 1e20, k * 1e20
    found = attend_whole(q, k, v, causal=False, scale=1.0)
    assert found is not None
    beyond = (q @ k.transpose(2, 3) == float("inf")).any(-1)
    assert beyond.any() and all(x[beyond].isnan().all() for x in found)


GOOD = torch.zeros(2, 4, 40, 16)
REFUSED: dict[str, dict[str, Any]] = {
    "three dimensions": {"k": GOOD[0]},
    "nothing": {"q": GOOD[:0], "k": GOOD[:0], "v": GOOD[:0]},
    "integers": {"q": GOOD.long(), "k": GOOD.long(), "v": GOOD.long()},
    "fp64": {"q": GOOD.double(), "k": GOOD.double(), "v": GOOD.double()},
    "mixed dtypes": {"k": GOOD.half()},
    "another batch": {"q": GOOD[:1]},
    "another width": {"q": torch.zeros(2, 4, 40, 32)},
    "uneven widths": {"v": GOOD[..., :8]},
    "fewer values": {"v": GOOD[:, :, :32]},
    "other heads": {"v": GOOD[:, :2]},
    "groups that do not divide": {"q": GOOD[:, :3]},
    "more queries than keys": {"k": GOOD[:, :, :36], "v": GOOD[:, :, :36]},
    "channels apart": {"k": torch.zeros(2, 4, 40, 32)[..., ::2]},
    "rows an odd distance apart": {
        name: torch.zeros(2, 4, 40, 17, dtype=torch.bfloat16)[..., :16] for name in "qkv"
    },
    "no scale": {"scale": 0.0},
    "a negative scale": {"scale": -1.0},
    "NaN as a scale": {"scale": float("nan")},
    "many scores": {name: GOOD[:, :, :1].expand(-1, -1, 7_000_000, -1) for name in "kv"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take(name: str) -> None:
    call: dict[str, Any] = {"q": GOOD, "k": GOOD, "v": GOOD, "scale": 1.0, **REFUSED[name]}
    assert attend_whole(call["q"], call["k"], call["v"], causal=True, scale=call["scale"]) is None


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("scale", [None, 0.1])
def test_numbers_are_no_inputs(name: str, scale: float | None) -> None:
    """The short way asks for shapes before anything has been checked."""
    inputs = {"q": GOOD, "k": GOOD, "v": GOOD, name: torch.tensor(1.0)}
    for mechanism in (MSSwift(), Full()):
        with pytest.raises(InputError, match=f"^{name}: expected a 4-D tensor"):
            mechanism(**inputs, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("layout", ["dense", "by token", "cut"])
def test_one_bad_number_is_found(dtype: torch.dtype, name: str, layout: str) -> None:
    """Wherever it is, one that no query would notice too: minus infinity hides a key."""
    generator = torch.Generator().manual_seed(1)
    for length in (70, 1100):
        for bad in (float("nan"), float("inf"), float("-inf")):
            inputs = dict(zip("qkv", made(length, length, layout=layout), strict=True))
            inputs = {key: x.to(dtype) for key, x in inputs.items()}
            x = inputs[name]
            place = [int(torch.randint(size, (), generator=generator)) for size in x.shape]
            x[tuple(place)] = bad
            assert attend_whole(**inputs, causal=True, scale=0.2) is None
            row = (
                {**inputs, "q": inputs["q"][:, :, place[2] :][:, :, :1]} if name == "q" else inputs
            )
            last = {**row, "q": row["q"][:, :, -1:]}
            assert attend_whole(**last, causal=True, scale=0.2) is None
            for mechanism in (MSSwift(), Full()):
                with pytest.raises(InputError, match=f"^{name}: expected finite"):
                    mechanism(**inputs)


def test_what_lies_beside_a_view_does_not_matter() -> None:
    q, k, v = made(64, 64)
    wide = torch.full((1, 2, 66, 48), float("nan"))
    wide[:, :, 1:-1, :32] = k
    found = attend_whole(q, wide[:, :, 1:-1, :32], v, causal=True, scale=0.2)
    expected = attend_whole(q, k, v, causal=True, scale=0.2)
    assert found is not None and expected is not None
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("mechanism", [MSSwift(), Full()], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_short_way_is_the_long_way(
    mechanism: Mechanism, dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.to(dtype) for x in made(90, 90, groups=3))
    short = mechanism(q, k, v, causal=causal)
    monkeypatch.setattr(type(mechanism), "_at_once", Mechanism._at_once)
    long = mechanism(q, k, v, causal=causal)
    assert torch.equal(short.out, long.out) and torch.equal(short.lse, long.lse)
    assert short.out.stride() == long.out.stride()
    assert short.stats == long.stats and short.stats.mode == "dense"


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that answered at once, as they do."""
    names: list[str] = []
    real = dispatch.attend_whole

    def attend(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        if found is not None:
            names.append(found[0])
        return found

    monkeypatch.setattr(dispatch, "attend_whole", attend)
    return names


def test_which_calls_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    names = taken(monkeypatch)
    q, k, v = made(90, 90)
    MSSwift()(q, k, v)
    MSSwift()(q[:, :, -40:], k, v, backend="native")
    Full()(q, k, v, causal=False)
    MSSwift()(q.clone().requires_grad_(), k, v)
    # A cache's summaries are of no use where every key is seen.
    MSSwift()(q[:, :, -1:], k, v, summary=KeySummary.build(k, v, 16))
    assert names == ["native"] * 5
    mask = torch.ones(1, 90, dtype=torch.bool)
    for longer in (
        lambda: MSSwift()(q, k, v, key_mask=mask),
        lambda: MSSwift()(q, k, v, backend="eager"),
        lambda: MSSwift(dense_below=64, windows=(32,), block=16)(q, k, v),
        lambda: MSSwift(collect=True)(q, k, v),
        lambda: MSSwift(dense_heads=(0,))(q, k, v),
    ):
        assert isinstance(longer(), AttentionResult)
    assert len(names) == 5


@pytest.mark.parametrize("training", [None, True, False])
def test_observers_are_told(training: bool | None) -> None:
    q, k, v = made(90, 90)
    seen: list[Observed] = []
    with observe(seen.append):
        result = MSSwift()(q, k, v, training=training)
    assert len(seen) == 1
    told = seen[0]
    assert told.result is result and told.q is q and told.k is k and told.v is v
    assert told.scale == 32**-0.5 and told.causal and told.key_mask is None
    assert told.training is bool(training)
    with observe(seen.append):
        MSSwift()(q.clone().requires_grad_(), k, v, training=training)
    assert seen[1].training is (training is not False)


def test_a_pattern_is_whole_only_if_it_shows_everything() -> None:
    assert is_whole(full_pattern(90, 2, causal=True), 40, 90)
    assert is_whole(full_pattern(90, 2, causal=False, q_len=200), 200, 90)
    narrow = BlockPattern(causal=True, bands=MSSwift().bands(5000, 2, causal=True))
    assert not is_whole(narrow, 5000, 5000)
    reach = replace(full_pattern(90, 1, causal=True).bands[0], reach=(5, 0))
    assert not is_whole(BlockPattern(causal=True, bands=(reach,)), 90, 90)
