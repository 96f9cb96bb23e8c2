"""Rivals of the attention benchmark: memories on equal inputs, and what a text leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longswift.eval import attention, attention_rivals, attention_table, options
from longswift.eval.attention import AttentionBench
from longswift.eval.attention_rivals import Rival, caller, carried
from longswift.mechanisms import get_mechanism
from longswift.memory import get_memory
from longswift.memory.base import LayerShape

INFINI = {"name": "infini", "segment": 16, "update": "delta_token"}
TRANSFORMER_XL = {"name": "transformer_xl", "segment": 16, "memory": 32}


def bench(*attentions: dict[str, Any], **changes: Any) -> AttentionBench:
    common = {"lengths": (64, 128), "dtype": "float32", "repeats": 1, "memory": False}
    return AttentionBench(mechanisms=attentions, **{**common, **changes})


def rival(name: str, **settings: Any) -> Rival:
    asked = bench({"name": name, **settings})
    return next(r for r in attention_rivals.rivals(asked) if r.name == name)


def test_a_memory_long_enough_is_full_attention() -> None:
    """The layer around it hands over the very keys and values of the other rivals."""
    for backward in (False, True):
        asked = bench(heads=4, kv_heads=2, backward=backward)
        q, k, v = attention.inputs(asked, 48)
        runs = [
            caller(asked, rival(name, **settings), q, k, v)
            for name, settings in (
                ("full", {}),
                ("infini", {"segment": 64}),
                ("transformer_xl", {"segment": 8, "memory": 48}),
            )
        ]
        full, *others = (run().out for run in runs)
        for out in others:
            torch.testing.assert_close(out, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_keys_of_a_memory_are_counted(length: int) -> None:
    shape = LayerShape(256, 4, 2, 8)
    own = sum(at % 16 + 1 for at in range(length)) / length
    memory = get_memory("infini", segment=16)
    assert memory.keys_per_query(length, shape) == pytest.approx(own + 8 / 2 * (1 + 1 * 2 / 4))
    rules = [
        get_memory("infini", segment=16, update=update).keys_per_query(length, shape)
        for update in ("linear", "delta_segment", "delta_token")
    ]
    assert rules == sorted(set(rules))
    seen = sum(min(at, at % 16 + 32) + 1 for at in range(length)) / length
    memory = get_memory("transformer_xl", segment=16, memory=32)
    assert memory.keys_per_query(length, shape) == pytest.approx(seen)


def test_memories_are_rivals_like_the_others() -> None:
    result = attention.run(bench(INFINI, TRANSFORMER_XL), progress=False)
    found = attention_table.series(result)
    assert set(found) == {"sdpa", "infini", "transformer_xl"}
    assert all(row.causal and row.density < 1 for row in found["transformer_xl"])
    both = attention.run(bench(INFINI, causal=False, lengths=(64,)), progress=False)
    assert [row["name"] for row in both.rows] == ["sdpa", "sdpa (causal)", "infini"]


@pytest.mark.parametrize("name", ["linear", "efficient", "performer"])
def test_what_a_recurrence_says_it_carries_is_what_it_allocates(name: str) -> None:
    asked, sizes = bench(batch=3, heads=4), []
    for length in (64, 200):
        q, k, v = attention.inputs(asked, length)
        sizes.append(carried(rival(name), q, k, v))
        told = get_mechanism(name)(q, k, v).stats.extra["state_bytes_per_sequence"]
        assert sizes[-1] == 3 * told
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("config", [INFINI, TRANSFORMER_XL], ids=lambda c: c["name"])
def test_what_a_memory_carries_does_not_grow(config: dict[str, Any]) -> None:
    # The same place in a segment: held tokens are part of the state.
    sizes = [
        carried(rival(**config), *attention.inputs(bench(), length)) for length in (48, 96, 480)
    ]
    assert sizes[0] == sizes[1] == sizes[2] > 0
    if config is INFINI:
        assert sizes[0] == 2 * 64 * (64 + 1) * 4


def test_a_cache_carries_every_key() -> None:
    q, k, v = attention.inputs(bench(), 512)
    window, swift = (carried(rival(name), q, k, v) for name in ("sliding_window", "ms_swift"))
    assert window >= k.nbytes + v.nbytes
    # Pages of 16 tokens: two extremes and two sums of D numbers each.
    assert swift - window == 2 * 4 * (512 // 16) * 64 * 4
    assert carried(rival("nystrom"), q, k, v) is None
    assert carried(Rival("sdpa", None, True), q, k, v) == window


def test_rows_hold_the_state() -> None:
    result = attention.run(bench({"name": "linear"}, INFINI, memory=True), progress=False)
    growth = result.summary["growth"]
    for name in ("linear", "infini"):
        (small, large) = attention_table.series(result)[name]
        assert small.state_bytes == large.state_bytes == 2 * 64 * 65 * 4
        assert growth[name]["state"] == pytest.approx(0)
    assert growth["sdpa"]["state"] > 0 and growth["sdpa"]["memory"] > 0
    cells = {row[0]: row for row in attention_table.growth_table(result).rows}
    assert cells["linear"][1] == "64 - 128" and (cells["linear"][5], cells["linear"][-1]) == (
        "0.00",
        "32.5 KiB",
    )


def test_choosing_among_mechanisms_and_memories() -> None:
    chosen, left_out = options.choose_attentions("all", ["infini.segment=8"])
    names = [attention.name for attention in chosen]
    assert {"full", "linear", "infini", "transformer_xl"} <= set(names) and not left_out
    (infini,) = (a for a in chosen if a.name == "infini")
    assert infini.to_dict()["segment"] == 8
    assert [a.name for a in options.choose_attentions("transformer-xl,full")[0]] == [
        "transformer_xl",
        "full",
    ]
    assert all(a.name != "infini" for a in options.choose("all")[0])
