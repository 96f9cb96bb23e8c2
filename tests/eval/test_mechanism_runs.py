"""The table of mechanisms: every row measured on the same work, or told why not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longswift import MSSwift
from longswift.core.errors import ConfigError
from longswift.eval import attention, mechanism_runs, mechanism_table, options, runner, suite
from longswift.eval.attention import AttentionBench
from longswift.eval.comparison_plot import plot_comparison
from longswift.eval.models import load
from longswift.eval.reading import hidden_states
from longswift.eval.results import load as load_result
from longswift.hf import SwiftCache
from longswift.mechanisms import MECHANISMS
from tests.eval.test_suite import SETTINGS

TABLE = {
    "encoder_only": "tests.eval.test_suite:EncoderOnly",
    "needs_options": "tests.eval.test_mechanism_runs:needs_options",
}


def needs_options(*, layout: str) -> None:
    """A mechanism that has no defaults."""


@pytest.fixture
def more_mechanisms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mechanisms that cannot do everything."""
    monkeypatch.setattr(MECHANISMS, "_table", {**MECHANISMS._table, **TABLE})


def comparison(model: Path, text: str = "all", **quality: Any) -> mechanism_runs.Comparison:
    chosen, left_out = options.choose(text, SETTINGS)
    return mechanism_runs.Comparison(
        speed=AttentionBench(
            lengths=(128, 256),
            mechanisms=tuple(mechanism.to_dict() for mechanism in chosen),
            dtype="float32",
            repeats=1,
            memory=False,
        ),
        quality=suite.asked(
            **{
                "model": str(model),
                "tasks": "needle",
                "attention": "full",
                "lengths": (300,),
                "samples": 1,
                "chunk": 128,
                **quality,
            }
        ),
        left_out=left_out,
    )


@pytest.mark.usefixtures("more_mechanisms")
def test_every_mechanism_has_a_row(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "longswift.mechanisms.list_mechanisms",
        lambda: ["full", "sliding_window", "ms_swift", *TABLE],
    )
    output = tmp_path / "table.json"
    result = mechanism_runs.run(comparison(model_directory), output, progress=False)
    rows = {row["name"]: mechanism_table.MechanismRow(**row) for row in result.rows}
    assert list(rows) == ["full", "sliding_window", "ms_swift", *TABLE]
    for name in ("full", "sliding_window", "ms_swift"):
        row = rows[name]
        assert row.causal and not row.note and row.seconds and row.exponent is not None
        assert set(row.scores) == {"needle"} and row.kl is not None and row.top1 is not None
    assert rows["full"].kl == 0 and rows["full"].perplexity_ratio == 1
    assert (rows["ms_swift"].kl or 0) > 0
    encoder = rows["encoder_only"]
    assert not encoder.causal and encoder.seconds and encoder.kl is None and not encoder.scores
    assert "no causal form" in encoder.note
    assert rows["needs_options"].note.startswith("not configured") and "layout" in str(rows)
    config = result.config["speed"]["mechanisms"]
    assert {m["name"]: m for m in config}["sliding_window"]["window"] == result.summary["window"]
    assert load_result(output, "compare").rows == result.rows
    table = mechanism_table.speed(result)
    assert len(table.rows) == 5 and "(bidirectional)" in table.rows[3][0]
    table = mechanism_table.quality(result)
    # Timed at other lengths: the share of keys there is none of the tasks'.
    assert [line[0] for line in table.rows] == list(rows)[:3] and "keys" not in table.columns
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert len(mechanism_table.sentences(result)) == 3
    picture = plot_comparison(result, tmp_path / "table.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Finished parts are not measured again.
    monkeypatch.setattr(attention, "_measure", None)
    monkeypatch.setattr(runner, "answer", None)
    again = mechanism_runs.run(comparison(model_directory), output, progress=False)
    assert again.rows == result.rows


def test_a_window_alone_keeps_its_size_and_full_attention_still_judges(
    model_directory: Path,
) -> None:
    chosen, left_out = options.choose("sliding_window", ["sliding_window.window=64"])
    asked = comparison(model_directory)
    asked = mechanism_runs.Comparison(
        speed=mechanism_runs._bench(asked.speed, chosen),
        quality=asked.quality,
        left_out=left_out,
    )
    result = mechanism_runs.run(asked, progress=False)
    assert [row["name"] for row in result.rows] == ["sliding_window"]
    assert result.summary["window"] is None and result.rows[0]["kl"] > 0
    assert result.config["speed"]["mechanisms"][0]["window"] == 64


def test_what_a_guard_did_is_told(model_directory: Path) -> None:
    chosen, left_out = options.choose("full,ms_swift", [*SETTINGS, "ms_swift.min_coverage=0.999"])
    asked = comparison(model_directory)
    asked = mechanism_runs.Comparison(
        speed=mechanism_runs._bench(asked.speed, chosen), quality=asked.quality, left_out=left_out
    )
    result = mechanism_runs.run(asked, progress=False)
    (said,) = (line for line in mechanism_table.sentences(result) if "guard" in line)
    assert said.startswith("ms_swift at 300 tokens: The guard (min_coverage=0.999)")


def test_full_attention_judges_even_if_it_is_too_slow_to_be_timed(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(bench: AttentionBench, length: int, earlier: Any) -> dict[str, float]:
        return {"full": 100.0} if length == 256 else {}

    monkeypatch.setattr(attention, "_too_slow", too_slow)
    result = mechanism_runs.run(comparison(model_directory, "full,ms_swift"), progress=False)
    full, swift = result.rows
    assert "would take" in full["note"] and full["seconds"] is None
    assert full["kl"] == 0 and full["scores"] and swift["kl"] > 0 and not swift["note"]


def test_impossible_comparisons_are_refused(model_directory: Path) -> None:
    with pytest.raises(ConfigError, match="one length"):
        comparison(model_directory, lengths=(300, 400))
    with pytest.raises(ConfigError, match="--set"):
        options.choose("all", ["nothing.window=1"])
    with pytest.raises(ConfigError, match="window"):
        options.choose("all", ["sliding_window.window=-1"])


def test_divergence_is_the_dense_one(model_directory: Path) -> None:
    loaded = load(str(model_directory))
    ids = torch.randint(2, 512, (330,)).tolist()
    few = MSSwift(windows=(32, 64), sinks=0, key_tokens=0, remainder=None, block=32, dense_below=0)
    states, logits = [], []
    for mechanism in (None, few):
        loaded.use(mechanism)
        with torch.inference_mode():
            cache = SwiftCache(loaded.model.config)
            states.append(list(hidden_states(loaded.model, ids, cache, 64)))
            logits.append(loaded.model(torch.tensor([ids])).logits[0].double())
    told = mechanism_runs._divergence(loaded, ids, *states)
    p, q = (x.log_softmax(-1) for x in logits)
    kl, same = (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert told["kl"] == pytest.approx(kl.item(), abs=1e-6) and kl > 1e-5
    assert told["top1"] == pytest.approx(same.item())
    targets = torch.tensor(ids[1:])
    nll = [torch.nn.functional.nll_loss(x[:-1], targets).item() for x in (p, q)]
    assert told["perplexity"] == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert told["perplexity_ratio"] == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
