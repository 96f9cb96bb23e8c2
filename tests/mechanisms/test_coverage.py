"""Captured mass, the guard and budgets of single heads, against dense computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longswift import ConfigError, Full, MSSwift, UnsupportedError
from longswift.core.observe import Observed, layer_scope, observe
from longswift.core.summary import KeySummary
from longswift.mechanisms.coverage import SAMPLED_ROWS, sample_rows

SMALL: dict[str, Any] = {
    "windows": (16, 32),
    "sinks": 4,
    "key_tokens": 16,
    "block": 16,
    "selector": {"name": "bounds", "key_block": 8, "row_group": 4},
    "remainder": 32,
    "dense_below": 0,
}


def draw(n: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 1, queries: int = 0) -> Any:
    generator = torch.Generator().manual_seed(n)

    def normal(h: int, length: int) -> Tensor:
        return torch.randn(batch, h, length, 8, generator=generator, dtype=torch.float64)

    return normal(heads, queries or n), normal(kv_heads, n), normal(kv_heads, n)


def dense_mass(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """``[B, Hq, Lq]`` share of full causal attention's mass on the keys in ``seen``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n, m = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    later = torch.arange(m) > torch.arange(m - n, m)[:, None]
    return (scores.masked_fill(later, float("-inf")).softmax(-1) * seen).sum(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [0, 40, 1])
def test_captured_mass_is_the_dense_one(queries: int, causal: bool) -> None:
    if queries and not causal:
        return
    q, k, v = draw(211, queries=queries)
    mechanism = MSSwift(**SMALL, collect=True)
    stats = mechanism(q, k, v, causal=causal).stats
    assert stats.captured is not None
    rows = sample_rows(q.shape[2], 211, SAMPLED_ROWS)
    assert stats.captured.basis == ("sampled" if queries == 0 else "exact")
    assert stats.captured.rows == len(rows) == min(64, q.shape[2])
    seen = mechanism.visible(q, k, causal=causal)
    if causal:
        mass = dense_mass(q, k, seen)[:, :, rows]
    else:
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        mass = (scores.softmax(-1) * seen).sum(-1)[:, :, rows]
    torch.testing.assert_close(torch.tensor(stats.captured.mean), mass.mean((0, 2)).float())
    torch.testing.assert_close(torch.tensor(stats.captured.lowest), mass.amin((0, 2)).float())
    exact = mechanism.exact_part()
    assert exact is not None
    whole = mechanism(q, k, v, causal=causal).lse
    share = (exact(q, k, v, causal=causal).lse - whole).exp()[:, :, rows]
    torch.testing.assert_close(
        torch.tensor(stats.captured.remainder), 1 - share.mean((0, 2)).float(), atol=1e-6, rtol=0
    )
    assert sum(stats.density_by_head) / 2 == pytest.approx(stats.density)


def test_collecting_changes_nothing_else() -> None:
    q, k, v = draw(150)
    plain, watched = MSSwift(**SMALL)(q, k, v), MSSwift(**SMALL, collect=True)(q, k, v)
    assert torch.equal(plain.out, watched.out) and plain.stats.captured is None
    assert watched.stats.to_dict()["captured"]["basis"] == "sampled"


def test_padding_is_not_measured() -> None:
    q, k, v = draw(120, batch=2)
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[1, :70] = False
    mechanism = MSSwift(**SMALL, collect=True)
    both = mechanism(q, k, v, key_mask=mask).stats.captured
    alone = [
        mechanism(*(x[b : b + 1, :, s:] for x in (q, k, v))).stats.captured
        for b, s in ((0, 0), (1, 70))
    ]
    assert both is not None and alone[0] is not None and alone[1] is not None
    for i in range(4):
        mean = (alone[0].mean[i] + alone[1].mean[i]) / 2
        assert both.mean[i] == pytest.approx(mean)
        assert both.lowest[i] == min(alone[0].lowest[i], alone[1].lowest[i])


def test_everything_dense_is_exact() -> None:
    q, k, v = draw(50)
    heads = MSSwift(collect=True)(q, k, v).stats.captured
    assert heads is not None
    assert heads.mean == (1.0,) * 4 and heads.lowest == (1.0,) * 4 and heads.basis == "exact"


def test_sampled_rows_cover_the_call_and_repeat() -> None:
    rows = sample_rows(10_000, 12_000, 64)
    assert rows == sorted(set(rows)) and rows == sample_rows(10_000, 12_000, 64)
    assert all(i * 10_000 // 64 <= row < (i + 1) * 10_000 // 64 for i, row in enumerate(rows))


def test_guard_catches_a_planted_failure() -> None:
    """A budget far too small: attention is spread evenly, so that no window holds it."""
    q, k, v = draw(300)
    poor = {**SMALL, "key_tokens": 0, "remainder": None}
    without = MSSwift(**poor)(q, k, v)
    guarded = MSSwift(**poor, min_coverage=0.9, collect=True)(q, k, v)
    full = Full()(q, k, v)
    told = guarded.stats.extra["guard"]
    assert told["dense"] > 0.8 * told["blocks"] and told["lowest"] < 0.3
    assert 0.9 - 1e-5 <= told["lowest_after"] <= 1.0
    assert guarded.stats.captured is not None and min(guarded.stats.captured.mean) > 0.95
    wrong = (without.out - full.out).norm() / full.out.norm()
    left = (guarded.out - full.out).norm() / full.out.norm()
    assert wrong > 0.5 and left < 0.1
    # What was computed densely is exactly full attention.
    torch.testing.assert_close(guarded.out[:, :, -100:], full.out[:, :, -100:])
    torch.testing.assert_close(guarded.lse[:, :, -100:], full.lse[:, :, -100:])
    assert guarded.stats.density > without.stats.density
    assert guarded.stats.dense_rows == pytest.approx(told["dense"] / told["blocks"], abs=0.01)


def test_guard_leaves_a_satisfied_target_alone() -> None:
    q, k, v = draw(300)
    without, guarded = (MSSwift(**SMALL, min_coverage=c)(q, k, v) for c in (None, 0.01))
    assert torch.equal(without.out, guarded.out) and torch.equal(without.lse, guarded.lse)
    assert guarded.stats.extra["guard"]["dense"] == 0


def test_guard_repairs_single_heads() -> None:
    """One KV head attends to its own position, the other evenly: only the second is repaired."""
    q, k, v = draw(256, heads=2)
    own = torch.randn(256, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = 30 * torch.nn.functional.normalize(own, dim=-1)
    q[:, 0], k[:, 0] = own, own
    q[:, 1] = 0.0
    told = MSSwift(**SMALL, min_coverage=0.9, collect=True)(q, k, v).stats
    assert told.captured is not None
    assert told.density_by_head[0] < 0.6 < 0.9 < told.density_by_head[1]
    assert told.extra["guard"]["dense"] <= told.extra["guard"]["blocks"] / 2


@pytest.mark.parametrize("left", [True, False])
def test_guard_counts_every_row_of_a_padded_batch(left: bool) -> None:
    q, k, v = draw(256, batch=3)
    lengths = (256, 200, 200)
    real = torch.arange(256) < torch.tensor(lengths)[:, None]
    key_mask = real.flip(1) if left else real
    guarded = MSSwift(**SMALL, min_coverage=0.6)
    told = guarded(q, k, v, key_mask=key_mask).stats.extra["guard"]
    alone = []
    for row, length in enumerate(lengths):
        own = slice(256 - length, None) if left else slice(length)
        one = (x[row : row + 1, :, own] for x in (q, k, v))
        alone.append(guarded(*one).stats.extra["guard"])
    assert 0 < told["dense"] < told["blocks"]
    assert told["blocks"] == sum(each["blocks"] for each in alone)
    assert told["dense"] == sum(each["dense"] for each in alone)
    assert told["lowest"] == pytest.approx(min(each["lowest"] for each in alone))


def test_guard_counts_heads_of_all_budgets() -> None:
    q, k, v = draw(256, heads=6, kv_heads=3)
    guarded = MSSwift(**{**SMALL, "key_tokens": (8, 0, 24)}, min_coverage=0.6)
    told = guarded(q, k, v).stats.extra["guard"]
    alone = []
    for head, budget in enumerate((8, 0, 24)):
        one = MSSwift(
            **{
                **SMALL,
                "key_tokens": budget,
                "scale_of_head": (guarded.windows.index(guarded.window_of_head(3)[head]),),
            },
            min_coverage=0.6,
        )
        own = slice(2 * head, 2 * head + 2)
        stats = one(q[:, own], k[:, head : head + 1], v[:, head : head + 1]).stats
        alone.append(stats.extra["guard"])
    assert 0 < told["dense"] < told["blocks"]
    for name in ("blocks", "dense"):
        assert told[name] == sum(each[name] for each in alone)
    assert told["lowest"] == pytest.approx(min(each["lowest"] for each in alone))


def test_guarded_gradients_are_those_of_what_ran() -> None:
    q, k, v = (x.requires_grad_() for x in draw(130))
    mechanism = MSSwift(**{**SMALL, "causality": "shared"}, min_coverage=0.6)
    out, lse, stats = mechanism(q, k, v)
    assert 0 < stats.extra["guard"]["dense"] < stats.extra["guard"]["blocks"]
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    slow = mechanism.reference(q, k, v)
    expected = torch.autograd.grad(slow.out.square().sum() + slow.lse.sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_guard_is_refused_where_probes_would_look_ahead() -> None:
    q, k, v = draw(100)
    with pytest.raises(UnsupportedError, match="min_coverage"):
        MSSwift(**SMALL, min_coverage=0.9)(q, k, v, training=True)
    MSSwift(**SMALL, min_coverage=0.9)(q, k, v, causal=False, training=True)


def test_budgets_of_single_heads_are_calls_of_single_heads() -> None:
    q, k, v = draw(200, heads=6, kv_heads=3, queries=64)
    options = {**SMALL, "scale_of_head": (1, 0, 1)}
    together = MSSwift(**{**options, "key_tokens": (8, 0, 24)}, collect=True)(q, k, v)
    for head, (budget, scale) in enumerate(zip((8, 0, 24), (1, 0, 1), strict=True)):
        one = MSSwift(**{**options, "key_tokens": budget, "scale_of_head": (scale,)}, collect=True)
        own = slice(2 * head, 2 * head + 2)
        alone = one(q[:, own], k[:, head : head + 1], v[:, head : head + 1])
        torch.testing.assert_close(together.out[:, own], alone.out)
        torch.testing.assert_close(together.lse[:, own], alone.lse)
        assert together.stats.captured is not None and alone.stats.captured is not None
        assert together.stats.captured.mean[own] == pytest.approx(alone.stats.captured.mean)
        assert together.stats.density_by_head[head : head + 1] == pytest.approx(
            alone.stats.density_by_head
        )


def test_dense_heads_are_full_attention() -> None:
    q, k, v = draw(200)
    result = MSSwift(**SMALL, dense_heads=(0,), collect=True)(q, k, v)
    full = Full()(q, k, v)
    torch.testing.assert_close(result.out[:, :2], full.out[:, :2])
    assert (result.out[:, 2:] - full.out[:, 2:]).norm() > 1e-3
    assert result.stats.captured is not None and result.stats.mechanism == "ms_swift"
    assert result.stats.captured.mean[:2] == (1.0, 1.0) and result.stats.captured.mean[2] < 1
    assert 0.5 < result.stats.density < 1
    everything = MSSwift(**SMALL, dense_heads=(0, 1))(q, k, v)
    torch.testing.assert_close(everything.out, full.out)


def test_summaries_serve_single_heads() -> None:
    q, k, v = draw(400, queries=1)
    mechanism = MSSwift(**{**SMALL, "key_tokens": (8, 32)})
    summary = KeySummary.build(k, v, 16)
    torch.testing.assert_close(mechanism(q, k, v, summary=summary).out, mechanism(q, k, v).out)


@pytest.mark.parametrize(
    "options",
    [
        {"key_tokens": (8, -1)},
        {"key_tokens": ()},
        {"dense_heads": (1, 0)},
        {"min_coverage": 1.5},
        {"collect": 1},
    ],
)
def test_impossible_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"MSSwift.{next(iter(options))}"):
        MSSwift(**options)


@pytest.mark.parametrize("options", [{"key_tokens": (8, 8, 8)}, {"dense_heads": (2,)}])
def test_options_of_other_head_counts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="2 KV heads"):
        MSSwift(**options)(*draw(40))


def test_observers_see_every_call_and_not_their_own() -> None:
    q, k, v = draw(40)
    seen: list[tuple[str, int | None]] = []

    def outer(call: Observed) -> None:
        Full()(call.q, call.k, call.v)
        seen.append((call.mechanism.name, call.layer))

    with observe(outer):
        MSSwift()(q, k, v)
        with layer_scope(3):
            result = Full()(q, k, v, causal=False)
        with pytest.raises(RuntimeError), observe(lambda call: None):
            raise RuntimeError
        Full()(q, k, v)
    Full()(q, k, v)
    assert seen == [("ms_swift", None), ("full", 3), ("full", None)]
    assert result.out.shape == q.shape
