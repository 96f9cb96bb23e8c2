"""The demonstration: one document, three ways, a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import longswift
from longswift.core.errors import ConfigError, InputError
from longswift.eval import demo
from longswift.eval.demo import Demo, equal_cost_window
from longswift.eval.plots import plot_demo
from longswift.eval.results import Result, load

SMALL = {
    "windows": (64, 128, 256),
    "key_tokens": 32,
    "sinks": 4,
    "remainder": 64,
    "dense_below": 0,
}


def asked(model: Path, **changes: Any) -> Demo:
    options = {
        "mechanism": longswift.MSSwift(**SMALL).to_dict(),
        "length": 1024,
        "documents": 2,
        "secrets": 2,
        "model": str(model),
        "chunk": 256,
        "decoded": 2,
    }
    return Demo(**{**options, **changes})


def test_three_rows_and_a_verdict(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = demo.run(asked(model_directory), tmp_path, progress=False)
    full, window, swift = demo.rows(result)
    assert (full.name, window.name, swift.name) == ("full", "sliding_window", "ms_swift")
    assert full.keys_per_query == 512.5 and full.density == 1.0
    assert window.keys_per_query == pytest.approx(swift.keys_per_query, rel=0.01)
    assert swift.density < 0.9
    for row in (full, window, swift):
        assert row.asked == 4 and row.found == sum(row.right)
        assert all(0 <= depth <= 1 for depth in row.depths)
        assert row.perplexity > 1 and row.prefill_seconds > 0
    assert result.summary["verdict"].startswith("MS-SWIFT reads 1,024 tokens")
    assert load(tmp_path / "demo.json", "demo") == result
    assert str(model_directory.parent) not in json.dumps(result.to_dict())
    assert len(demo.table(result).rows) == 3
    picture = plot_demo(result, tmp_path / "demo.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_finished_readings_are_reused(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, done = demo._read, []

    def interrupt_second(*args: Any) -> Any:
        done.append(args[3])
        if len(done) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(demo, "_read", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        demo.run(asked(model_directory), tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["demo.partial.json"]
    demo.run(asked(model_directory), tmp_path, progress=False)
    assert done == ["full", "ms_swift", "ms_swift", "sliding_window"]
    finished = demo.run(asked(model_directory), tmp_path, progress=False)
    assert len(done) == 4 and finished.summary["reused"] == 3
    demo.run(asked(model_directory, seed=1), tmp_path, progress=False)
    assert len(done) == 7
    demo.run(asked(model_directory, seed=1), tmp_path, fresh=True, progress=False)
    assert len(done) == 10


@pytest.mark.parametrize("length", [2, 100, 4096, 131072])
@pytest.mark.parametrize("window", [1, 7, 512, 100_000])
def test_a_window_of_equal_cost_is_the_window(window: int, length: int) -> None:
    window = min(window, length)
    keys = window - window * (window - 1) / (2 * length)
    assert equal_cost_window(keys, length) == window


def test_impossible_requests_are_refused(model_directory: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(InputError, match="at least"):
        demo.run(asked(model_directory, file=str(short)), tmp_path, progress=False)
    with pytest.raises(InputError, match="--length"):
        demo.run(asked(model_directory, length=64), tmp_path, progress=False)
    with pytest.raises(ConfigError):
        asked(model_directory, chunk=100)
    with pytest.raises(ConfigError):
        asked(model_directory, secrets=0)


def test_the_verdict_names_a_slowdown() -> None:
    row = {
        "label": "",
        "length": 8,
        "decode_tokens_per_second": 1.0,
        "peak_bytes": None,
        "found": 1,
        "asked": 2,
        "right": [True, False],
        "depths": [0.1, 0.2],
        "answers": ["1", "2"],
        "perplexity": 2.0,
        "keys_per_query": 2.0,
        "density": 0.5,
    }
    rows = [
        {**row, "name": name, "prefill_seconds": seconds}
        for name, seconds in (("full", 1.0), ("sliding_window", 1.0), ("ms_swift", 2.0))
    ]
    result = Result(kind="demo", config={"model": "m", "length": 8}, seed=0, rows=rows)
    assert "2.0x slower than full attention" in demo.verdict(demo.rows(result))
    assert demo.table(result).rows[0][3] == "-"


def test_the_packaged_model_reads_sparsely_almost_as_well_as_fully(tmp_path: Path) -> None:
    from longswift import tiny

    if not (tiny.path() / "model.safetensors").is_file():
        pytest.skip("the packaged model's weights are not in this checkout")
    swift = longswift.MSSwift(**{**SMALL, "key_tokens": 128})
    asked = Demo(mechanism=swift.to_dict(), length=2048, secrets=4, decoded=2)
    full, window, sparse = demo.rows(demo.run(asked, tmp_path, progress=False))
    assert sparse.density < 0.5
    assert abs(sparse.perplexity - full.perplexity) < 0.05 * full.perplexity
    assert sparse.found >= max(window.found, full.found - 1)
