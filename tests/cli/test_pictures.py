"""``longswift patterns`` and ``longswift report``: files written, errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import run


@pytest.fixture
def document(tmp_path: Path) -> Path:
    from longswift.tiny import corpus

    file = tmp_path / "doc.txt"
    file.write_text(corpus.text("heldout")[:4000], encoding="utf-8")
    return file


def test_patterns_draws(tmp_path: Path) -> None:
    out = tmp_path / "p.svg"
    options = ["--mechanism", "sliding_window", "--length", "16", "--config", "window=4"]
    result = run("patterns", *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert "sliding_window, causal, 16 tokens: 43 % of pairs exact" in result.output
    assert out.read_bytes().startswith(b"<?xml")


def test_patterns_shows_words(model_directory: Path, document: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.html"
    result = run("patterns", model_directory, "--file", document, "--query", "what", "--out", out)
    assert result.exit_code == 0, result.output
    assert "layer 1, KV head 0" in result.output and "what" in out.read_text(encoding="utf-8")


def test_report_writes_page_and_json(model_directory: Path, document: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "r.html"
    options = ["--file", document, "--length", "512", "--tasks", "none", "--no-fidelity"]
    result = run("report", model_directory, *options, "--chunk", "256", "--out", out)
    assert result.exit_code == 0, result.output
    # The default reads the first 4,096 tokens exactly, and the report says what that is worth.
    assert "it is full attention" in result.output
    assert sorted(p.name for p in out.parent.iterdir()) == ["r.html", "r.json"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["patterns", "--mechanism", "nothing", "--out", "x.png"], "'nothing'"),
        (["patterns", "--out", "x.pdf"], ".svg"),
        (["patterns", "tiny", "--file", "no.txt", "--out", "x.png"], ".html"),
        (["report", "tiny", "--file", "no.txt", "--out", "x.json"], ".html"),
        (["patterns", "tiny"], "--file"),
        (["patterns", "tiny", "--file", "no.txt", "--mechanism", "linear"], "through a state"),
        (["patterns", "--length", "9", "--out", "x.png"], "16 to 512"),
        (["report", "tiny", "--file", "no.txt", "--attention", "full"], "beside full"),
        (["report", "tiny", "--file", "no.txt"], "no such file"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    lines = result.output.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert lines[0].startswith("longswift: ") and why in lines[0]
