"""``eval``, ``compare`` and ``bench recall`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import refuse, run

SMALL = ["--set", "ms_swift.windows=[64,128]", "--set", "ms_swift.dense_below=0"]


def test_eval_writes_a_result_its_samples_and_a_picture(
    model_directory: Path, tmp_path: Path
) -> None:
    data, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--tasks", "passkey,kv", "--lengths", "300", "--samples", "1", *SMALL]
    options += ["--set", "kv.questions=2", "--json", data, "--plot", picture]
    result = run("eval", model_directory, *options)
    assert result.exit_code == 0, result.output
    assert "passkey" in result.output and "sliding_window" in result.output
    assert json.loads(data.read_text())["kind"] == "eval"
    assert (tmp_path / "out.samples.jsonl").is_file()
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run("eval", model_directory, *options)
    assert "6 samples are from an earlier run" in again.output
    other = ["--tasks", "passkey", "--lengths", "300", "--samples", "1", "--json", data]
    assert "--fresh" in refuse("eval", model_directory, *other)


def test_eval_refuses(model_directory: Path, tmp_path: Path) -> None:
    assert "MODEL" in refuse("eval").upper()
    assert "Did you mean 'needle'" in refuse("eval", model_directory, "--tasks", "nedle")
    assert "qa.file" in refuse("eval", model_directory, "--tasks", "qa")
    assert "key_value" in refuse("eval", model_directory, "--tasks", "copy", "--form", "key_value")
    assert "no such file" in refuse("eval", model_directory, "--file", tmp_path / "none")
    assert "no such directory" in refuse("eval", "./none")
    assert "Did you mean 'form'" in refuse("eval", model_directory, "--set", "needle.frm=0")
    unknown = refuse("eval", model_directory, "--set", "needle.foo=0")
    assert "task 'needle': expected options among" in unknown and unknown.count("foo") == 1
    for settings in ("copy.words=3", "nonsense.words=3"):
        name, _, _ = settings.partition(".")
        strange = refuse("eval", model_directory, "--set", settings)
        assert "(needle, kv, full, ms_swift, sliding_window)" in strange
        assert f"got '{name}' in" in strange
    assert "(needle, kv)" in refuse(
        "eval", model_directory, "--attention", "model", "--set", "model.x=1"
    )
    for names in ("", " , "):
        nothing = refuse("eval", model_directory, "--attention", names)
        assert nothing.startswith(
            f"longswift: mechanism: expected at least one name, got {names!r}"
        )
    assert "/proc/nowhere" in refuse("eval", model_directory, "--json", "/proc/nowhere/out.json")
    questions = tmp_path / "qa.jsonl"
    questions.write_text("{}\n")
    wrong = refuse("eval", model_directory, "--tasks", "qa", "--questions", questions)
    assert "line 1" in wrong


def test_compare_prints_the_table(model_directory: Path, tmp_path: Path) -> None:
    options = ["--model", model_directory, "--attention", "full,sliding_window"]
    options += ["--lengths", "128", "--length", "300", "--samples", "1", "--repeats", "1"]
    result = run("compare", *options, "--no-memory", "--json", tmp_path / "t.json")
    assert result.exit_code == 0, result.output
    assert "top 1" in result.output and "needle" in result.output
    assert json.loads((tmp_path / "t.json").read_text())["kind"] == "compare"
    assert "'x'" in refuse("compare", "--attention", "x")
    assert "ms_swift" in refuse("compare", "--set", "needle.foo=0").partition("got 'needle' in")[0]
    for command in (["compare"], ["eval", "tiny"]):
        assert ".png or .svg" in refuse(*command, "--plot", tmp_path / "r.jpg")
    assert not (tmp_path / "r.jpg").exists()


def test_recall_needs_no_model(tmp_path: Path) -> None:
    options = ["--length", "2048", "--pairs", "8", "--trials", "1", "--json", tmp_path / "r.json"]
    result = run("bench", "recall", "--mechanism", "sliding_window", *options)
    assert result.exit_code == 0, result.output
    assert "keys seen" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["found"] < 0.9
    assert "pairs" in refuse("bench", "recall", "--pairs", "5000")
    assert "causal form" in refuse("bench", "recall", "--mechanism", "nystrom")
