"""``longswift fidelity`` and ``longswift calibrate`` at small sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_cli import refuse, run

OPTIONS = {
    "windows": "[16,64]",
    "sinks": 4,
    "key_tokens": 16,
    "block": 16,
    "selector": '{"name":"bounds","key_block":8,"row_group":4}',
    "remainder": 32,
    "dense_below": 0,
}
SET = [part for name, value in OPTIONS.items() for part in ("--set", f"ms_swift.{name}={value}")]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "doc.txt"
    file.write_text("The import statement finds a module. " * 200, encoding="utf-8")
    return file


def test_calibrate_then_measure(model_directory: Path, document: Path, tmp_path: Path) -> None:
    profile, data = tmp_path / "profile.json", tmp_path / "fidelity.json"
    size = ["--file", document, "--length", "256", "--documents", "1", "--chunk", "128"]
    more = ["--target", "0.4", "--budgets", "0,32", "--out", profile]
    result = run("calibrate", model_directory, *size, *SET, *more)
    assert result.exit_code == 0, result.output
    assert "The profile keeps" in result.output and "checked" in result.output
    assert json.loads(profile.read_text())["version"] == 1
    result = run("fidelity", model_directory, *size, "--profile", profile, "--json", data)
    assert result.exit_code == 0, result.output
    assert "profile scores" in result.output and "window of equal cost" in result.output
    assert json.loads(data.read_text())["summary"]["measured"] == "profile"


def test_errors_are_one_line(model_directory: Path, document: Path, tmp_path: Path) -> None:
    assert "--set" in refuse("fidelity", model_directory, "--profile", "p", "--set", "full.x=1")
    assert "profile" in refuse("fidelity", model_directory, "--profile", tmp_path / "none.json")
    assert "--target" in refuse("calibrate", model_directory, "--target", "2")
    assert "counts" in refuse("calibrate", model_directory, "--budgets", "few")
    out = ["--out", tmp_path / "p.json"]
    assert "tokens" in refuse("calibrate", model_directory, "--file", document, *out)


def test_texts_longer_than_the_model_was_trained_for(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    """Refused with an option of the command, and read with it."""
    short = tmp_path / "short"
    shutil.copytree(model_directory, short)
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 256
    (short / "config.json").write_text(json.dumps(config))
    size = ["--file", document, "--length", "512", "--chunk", "128", *SET]
    commands = {
        "fidelity": ["--json", tmp_path / "fidelity.json"],
        "calibrate": ["--budgets", "0", "--documents", "1", "--out", tmp_path / "profile.json"],
        "report": ["--tasks", "needle", "--samples", "1", "--out", tmp_path / "report.html"],
    }
    for command, more in commands.items():
        why = refuse(command, short, *size, *more)
        assert "at most 256 tokens, got 512. Extend its positions with --max-length" in why
        assert "rope" in refuse(command, short, *size, *more, "--rope", "none-such")
        found = run(command, short, *size, *more, "--max-length", "512", "--rope", "linear")
        assert found.exit_code == 0, found.output
    for name in ("fidelity", "report"):
        kept = json.loads((tmp_path / f"{name}.json").read_text())["config"]
        assert (kept["length"], kept["max_length"], kept["rope"]) == (512, 512, "linear")
    assert json.loads((tmp_path / "profile.json").read_text())["calibration"]["max_length"] == 512
    assert "--length" in refuse("demo", "--model", short, "--length", "512")


def test_a_command_never_replaces_what_it_reads(
    model_directory: Path, document: Path, tmp_path: Path
) -> None:
    before, config = document.read_text(), (model_directory / "config.json").read_text()
    size = ["--file", document, "--length", "256", "--chunk", "128", *SET]
    assert "something else" in refuse("fidelity", model_directory, *size, "--json", document)
    assert "something else" in refuse("calibrate", model_directory, *size, "--out", document)
    own = model_directory / "config.json"
    assert "something else" in refuse("calibrate", model_directory, *size, "--out", own)
    profile = tmp_path / "p.json"
    profile.write_text('{"format": "longswift-profile", "version": 1}')
    assert "profile of" in refuse("fidelity", model_directory, *size, "--json", profile)
    page, beside = tmp_path / "r.html", tmp_path / "r.json"
    beside.write_text('{"my": "data"}')
    assert "r.json" in refuse("report", model_directory, *size, "--out", page)
    assert document.read_text() == before and own.read_text() == config
    assert beside.read_text() == '{"my": "data"}' and not page.exists()
