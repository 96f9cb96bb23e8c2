"""Random recall: full attention finds all, a window only what is near, and selections differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longswift import Full, MSSwift, SlidingWindow
from longswift.core.errors import ConfigError
from longswift.eval import recall
from longswift.eval.results import load as load_result
from tests.eval.test_suite import EncoderOnly

SMALL = recall.Recall(length=1024, pairs=24, rows=256, heads=4, kv_heads=2, trials=1)


def test_full_attention_puts_the_wanted_weight_on_the_pair() -> None:
    made = recall.make(SMALL)
    weights = []
    for head in range(SMALL.heads):
        q, k = made.q[0, head, made.asking[head]], made.k[0, head // 2]
        # Asking rows come last, and all keys but the latest are in their past.
        p = (q @ k.T / 8).softmax(-1)
        weights.append(p.gather(1, made.places[head // 2][:, None]))
    assert torch.cat(weights).mean().item() == pytest.approx(SMALL.certainty, abs=0.04)
    again, other = recall.make(SMALL), recall.make(SMALL, 1)
    assert torch.equal(made.q, again.q) and not torch.equal(made.q, other.q)


def test_a_window_misses_what_a_selection_finds() -> None:
    swift = {"windows": (128,), "key_tokens": 128, "dense_below": 0, "remainder": None}
    rows = {
        name: recall.measure(SMALL, mechanism)
        for name, mechanism in {
            "full": Full(),
            "window": SlidingWindow(window=256),
            "bounds": MSSwift(**swift),
            "antidiagonal": MSSwift(**swift, selector="antidiagonal"),
        }.items()
    }
    assert rows["full"].found == rows["full"].seen == 1 and rows["full"].asked == 96
    assert rows["window"].found < 0.3
    assert rows["bounds"].found > rows["antidiagonal"].found > rows["window"].found - 0.1
    for row in rows.values():
        assert row.seen is not None and row.low <= row.found <= row.high
        assert row.found == pytest.approx(row.seen, abs=0.15)


def test_results_are_typed_and_name_what_did_not_run(tmp_path: Path) -> None:
    result = recall.run(SMALL, [("all", Full()), ("encoder", EncoderOnly())])
    assert [row["name"] for row in result.rows] == ["all"]
    assert "causal" in result.summary["refused"]["encoder"]
    assert len(recall.table(result).rows) == 1
    assert recall.sentences(result)[0].startswith("encoder did not run: ")
    file = result.save(tmp_path / "r.json")
    assert load_result(file, "recall") == result
    assert json.loads(file.read_text())["config"]["mechanisms"]["all"] == {"name": "full"}


def test_a_mechanism_that_leaves_nothing_out_is_said_to_prove_nothing() -> None:
    dense = MSSwift(dense_below=SMALL.length)
    result = recall.run(SMALL, [("all", Full()), ("swift", dense)])
    (said,) = recall.sentences(result)
    assert said.startswith("swift is dense at 1,024 tokens")


def test_by_default_the_default_selects() -> None:
    row = recall.measure(recall.Recall(trials=1), MSSwift(), visible=False)
    assert row.density < 0.2 and row.found > 0.9


@pytest.mark.parametrize(
    "change", [{"pairs": 300}, {"rows": 2000}, {"heads": 3}, {"certainty": 1.0}, {"trials": 0}]
)
def test_impossible_problems_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        recall.Recall(**{"length": 1024, "rows": 256, "heads": 4, "kv_heads": 2, **change})
