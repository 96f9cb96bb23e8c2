"""The comparison of ways to choose keys."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from longswift import Full, MSSwift, SlidingWindow
from longswift.core.errors import ConfigError
from longswift.core.mechanism import Mechanism
from longswift.eval import selection
from longswift.eval.selection import Study, summarise
from longswift.hf.loading import random_llama

WHOLE = Full()
SPARSE = MSSwift(windows=(32, 64), key_tokens=16, block=32, dense_below=0, sinks=4)
MECHANISMS: dict[str, Mechanism] = {
    "whole": MSSwift(windows=(64,), key_tokens=4096, block=32, dense_below=0),
    "sparse": SPARSE,
    "window": SlidingWindow(window=32),
}


def study(directory: Path, **options: Any) -> Study:
    return Study(
        mechanisms={name: own.to_dict() for name, own in MECHANISMS.items()},
        model=str(directory),
        length=500,
        secrets=2,
        repeats=1,
        **options,
    )


def test_what_sees_everything_loses_nothing(model_directory: Path, tmp_path: Path) -> None:
    asked = study(model_directory, documents=2)
    result = selection.run(asked, tmp_path / "s.json", progress=False)
    assert len(result.rows) == 2 * 4
    found = {row["name"]: row for row in result.summary["mechanisms"]}
    assert list(found) == ["full", *MECHANISMS]
    whole, sparse, window = (found[name] for name in MECHANISMS)
    assert whole["captured"] == pytest.approx(1.0, abs=1e-4)
    assert whole["kl"] == pytest.approx(0.0, abs=1e-4)
    assert whole["error"] < 1e-3 < sparse["error"] < window["error"]
    assert window["captured"] < sparse["captured"] < 1.0
    assert sparse["keys_per_query"] < whole["keys_per_query"]
    assert all(row["seconds"] > 0 for row in found.values())
    again = selection.run(asked, tmp_path / "s.json", progress=False)
    assert again.rows == result.rows
    assert [row[0] for row in selection.table(result).rows] == list(found)


def test_positions_are_stretched_as_asked(model_directory: Path, tmp_path: Path) -> None:
    """They change what the dense model itself reads, before any rival is compared."""
    for part in model_directory.glob("tokenizer*"):
        shutil.copy(part, tmp_path)
    random_llama(600, heads=4, kv_heads=2, head_dim=8, vocabulary=512).save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = [
        {},
        *({"max_length": 4000, "rope": rope} for rope in ("linear", "yarn")),
    ]
    found = [
        selection.run(study(tmp_path, **options), tmp_path / f"{i}.json", progress=False)
        for i, options in enumerate(asked)
    ]
    assert len({result.rows[0]["nll"] for result in found}) == 3
    assert found[2].config["max_length"] == 4000
    with pytest.raises(ConfigError, match="rope"):
        study(model_directory, rope="yearn")


def test_only_secrets_that_full_attention_answers_count() -> None:
    def row(name: str, right: list[bool]) -> dict[str, object]:
        figures = dict.fromkeys(
            ("keys_per_query", "density", "seconds", "ratio", "kl", "nll", "agreement"), 1.0
        )
        empty = dict.fromkeys(("captured", "captured_worst", "error"))
        return {"name": name, "document": 0, "right": right, **figures, **empty}

    full, rival = summarise([row("full", [True, True, False]), row("x", [True, False, True])])
    assert (full["found"], full["asked"]) == (2, 2)
    assert (rival["found"], rival["asked"]) == (1, 2)
    assert rival["perplexity_ratio"] == 1.0
