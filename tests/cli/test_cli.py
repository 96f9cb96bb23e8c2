"""The command line: success at small sizes, and every user error in one line."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longswift.cli.main import app

BENCH = ["bench", "attention", "--lengths", "256,512", "--repeats", "1", "--no-memory"]


def run(*arguments: object) -> Any:
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    return CliRunner().invoke(app, [str(a) for a in arguments], env=plain)


def refuse(*arguments: object) -> str:
    """Run a command that must fail in one line with exit code 2; returns the line."""
    result = run(*arguments)
    lines = result.output.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("longswift: "), result.output
    return lines[0]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "doc.txt"
    file.write_text("The import statement finds a module. " * 20, encoding="utf-8")
    return file


def test_help_and_version() -> None:
    assert "generate" in run().output and run().exit_code == 0
    assert "bench" in run("--help").output
    assert run("--version").output.startswith("longswift ")
    for command in ("info", "generate", "demo", "eval", "compare", "bench", "tiny"):
        assert run(command, "--help").exit_code == 0
    for command in ("fidelity", "calibrate"):
        assert run(command, "--help").exit_code == 0
    assert "--kv-heads" in run("bench", "attention", "--help").output


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    assert "ms_swift" in result.output and "torch" in result.output and "eager" in result.output
    assert json.loads(run("info", "--json").output)["environment"]["versions"]["longswift"]


def test_bench_writes_json_and_a_picture(tmp_path: Path) -> None:
    data, picture = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--mechanism", "sliding_window,ms_swift", "--set", "sliding_window.window=64"]
    result = run(*BENCH, *options, "--json", data, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "than SDPA" in result.output and "sliding_window" in result.output
    assert {row["length"] for row in json.loads(data.read_text())["rows"]} == {256, 512}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--lengths", "many"], "'many'"),
        (["--lengths", ""], "at least one"),
        (["--mechanism", "ms_swfit"], "Did you mean 'ms_swift'"),
        (["--mechanism", "infni"], "transformer_xl, all, got 'infni'. Did you mean 'infini'"),
        (["--mechanism", "ms--swift"], "'-' is accepted for '_'"),
        (["--mechanism", "full", "--set", "full.size=3"], "size"),
        (["--dtype", "int8"], "int8"),
        (["--heads", "3", "--kv-heads", "2"], "multiple"),
        (["--heads", "0"], "heads"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "meta"], "'meta'"),
        (["--repeats", "x"], "--repeats"),
        (["--no-such-option"], "--no-such-option"),
        (["--mechanism", "full", "--json", "/proc/nowhere/r.json"], "/proc/nowhere/r.json"),
        (["--mechanism", "full", "--plot", "/proc/nowhere/r.png"], "/proc/nowhere"),
        (["--mechanism", "full", "--json", "."], "directory"),
    ],
)
def test_bench_refuses(options: list[str], why: str) -> None:
    assert why in refuse("bench", "attention", *options)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (
            ["generate", "--attention", "model", "--set", "ms_swift.sinks=2"],
            "model: expected no --",
        ),
        (["generate", "--profile", "p.json", "--set", "ms_swift.sinks=2"], "expected no --set"),
        (["patterns", "--bidirectional"], "expected no --bidirectional"),
        (["patterns", "--length", "32"], "expected no --length"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    command: list[str], why: str, document: Path
) -> None:
    name, *options = command
    assert why in refuse(name, "tiny", "--file", document, *options)


def test_options_without_what_they_belong_to_are_refused(document: Path) -> None:
    assert "expected no --query" in refuse("patterns", "--query", "who?")
    assert "expected no --position" in refuse("patterns", "--position", "0")
    assert "expected no --tune-file" in refuse("compare", "--tune-file", document)
    assert "the task qa" in refuse("eval", "tiny", "--questions", document)
    assert "batches: expected whole numbers of at least 1" in refuse(
        "bench", "decode", "--batches", "0"
    )


@pytest.mark.parametrize(
    "command",
    [
        BENCH,
        ["bench", "decode"],
        ["bench", "prefill", "random-llama"],
        ["bench", "train"],
        ["compare"],
        ["eval", "tiny"],
    ],
    ids=lambda command: command[1] if command[0] == "bench" else command[0],
)
def test_outputs_that_would_replace_each_other_are_refused(
    command: list[str], tmp_path: Path
) -> None:
    picture, link = tmp_path / "new" / "x.png", tmp_path / "link.json"
    same = refuse(*command, "--json", picture, "--plot", picture)
    assert "a file of its own for each output" in same and "two outputs in" in same
    link.symlink_to(picture)
    assert "the same file as" in refuse(*command, "--json", link, "--plot", picture)
    assert [p.name for p in tmp_path.iterdir()] == ["link.json"]


def test_a_page_and_its_figures_are_two_files(document: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    (tmp_path / "r.json").symlink_to(page)
    assert "the same file as" in refuse("report", "tiny", "--file", document, "--out", page)
    for name in ("demo.json", "demo.png"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere.png")
    assert "the same file as" in refuse("demo", "--output", tmp_path)


def test_ctrl_c_stays_ctrl_c_where_an_import_turned_it_into_an_error(
    monkeypatch: pytest.MonkeyPatch, document: Path
) -> None:
    def importing(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module 'X'.") from RuntimeError("numpy")

    monkeypatch.setattr("longswift.eval.answering.Question", importing)
    # What a shell starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("generate", "tiny", "--file", document)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130, result.output
    assert result.output.strip() == "longswift: interrupted; no half-written file is left."


def test_a_lazy_import_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, document: Path
) -> None:
    def importing(*_: object, **__: object) -> None:
        try:
            raise ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Could not import module 'X'.") from error

    monkeypatch.setattr("longswift.eval.answering.Question", importing)
    assert "pip install sentencepiece" in refuse("generate", "tiny", "--file", document)


def test_unknown_and_missing_commands() -> None:
    assert "frobnicate" in refuse("frobnicate")
    assert "Missing command" in refuse("bench")
    assert "MODEL" in refuse("generate").upper()


def test_generate_streams_an_answer(model_directory: Path, document: Path) -> None:
    options = ["--file", document, "--prompt", "What?", "--max-new-tokens", "3", "--chunk", "128"]
    result = run("generate", model_directory, *options)
    assert result.exit_code == 0, result.output
    assert "wrote 3 at" in result.output or "wrote" in result.output


def test_generate_refuses(model_directory: Path, document: Path, tmp_path: Path) -> None:
    binary, empty = tmp_path / "b.bin", tmp_path / "e.txt"
    binary.write_bytes(b"\0\1\2")
    empty.write_text("")
    file = ["--file", document]
    assert "no such file" in refuse("generate", model_directory, "--file", tmp_path / "none")
    assert "binary" in refuse("generate", model_directory, "--file", binary)
    assert "empty" in refuse("generate", model_directory, "--file", empty)
    assert "no such directory" in refuse("generate", "./none", *file)
    assert "config.json" in refuse("generate", tmp_path, *file)
    assert "'x'" in refuse("generate", model_directory, *file, "--attention", "x")
    assert "int8" in refuse("generate", model_directory, *file, "--dtype", "int8")
    assert "block" in refuse("generate", model_directory, *file, "--chunk", "100")
    assert "'far'" in refuse("generate", model_directory, *file, "--max-length", "far")


def test_a_hub_name_without_a_hub_is_one_line(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longswift.hf import loading

    monkeypatch.setattr(loading, "_reachable", lambda name: False)
    assert "cannot be reached" in refuse("generate", "nobody/nothing", "--file", document)


def test_demo_writes_its_story(model_directory: Path, tmp_path: Path) -> None:
    options = [
        "--model",
        model_directory,
        "--length",
        "1024",
        "--documents",
        "1",
        "--secrets",
        "2",
        "--chunk",
        "512",
    ]
    result = run("demo", *options, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("MS-SWIFT reads 1,024 tokens")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "demo.png"]


def test_demo_refuses(model_directory: Path, tmp_path: Path) -> None:
    options = ["demo", "--model", model_directory, "--output", tmp_path]
    assert "'long'" in refuse(*options, "--length", "long")
    assert "secrets" in refuse(*options, "--secrets", "0")
    assert "128" in refuse(*options, "--chunk", "100")
    assert "no such file" in refuse(*options, "--file", tmp_path / "none")
    assert "/proc/nowhere" in refuse("demo", "--output", "/proc/nowhere/out")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert str(blocked) in refuse("demo", "--output", blocked / "out")


def test_tiny_refuses(tmp_path: Path) -> None:
    assert "config.json" in refuse("tiny", "card", tmp_path)
    assert "--out" in refuse("tiny", "train")
    wrong = refuse("tiny", "train", "--out", tmp_path / "run", "--recipe", "rotory")
    assert "packaged, rotary" in wrong and "Did you mean 'rotary'" in wrong
    assert not (tmp_path / "run").exists()
    for option in ("--threads", "--max-steps", "--seed"):
        for value in ("-1",) if option == "--seed" else ("0", "-1"):
            wrong = refuse("tiny", "train", "--out", tmp_path / "run", option, value)
            assert option[2:].replace("-", "_") in wrong and f"got {value}" in wrong
    assert "threads" in refuse("tiny", "card", tmp_path, "--threads", "0")
    assert "seed" in refuse("tiny", "card", tmp_path, "--seed", "-1")
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "windows" in refuse("tiny", "card", tmp_path, "--write")


def test_tiny_train_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longswift.tiny import train

    asked = []

    def fake(out: Path, *, config: Any) -> Path:
        asked.append((out, config.family, config.threads, config.seed, config.max_steps))
        return out / "model"

    monkeypatch.setattr(train, "train", fake)
    options = ["--out", tmp_path, "--threads", "2", "--seed", "7", "--max-steps", "5"]
    assert run("tiny", "train", *options).exit_code == 0
    assert run("tiny", "train", "--out", tmp_path, "--recipe", "rotary").exit_code == 0
    assert asked == [(tmp_path, "smollm3", 2, 7, 5), (tmp_path, "llama", 1, 2, None)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: x")])
def test_running_out_of_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longswift.eval import attention

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(attention, "run", fail)
    assert "out of memory" in refuse(*BENCH)


def test_ctrl_c_is_one_line_and_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longswift.eval import attention

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "_measure", interrupt)
    result = run(*BENCH, "--json", tmp_path / "r.json")
    assert result.exit_code == 130
    assert len(result.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSWIFT_DEBUG", "1")
    result = run("bench", "attention", "--dtype", "int8")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("command", ["generate", "report", "eval", "fidelity", "calibrate"])
def test_a_scaling_needs_a_length_and_a_known_name(command: str, document: Path) -> None:
    options = [command, "tiny", "--file", document]
    assert "--max-length" in refuse(*options, "--rope", "linear")
    assert "--max-length" in refuse(*options, "--rope", "none")
    wrong = refuse(*options, "--max-length", "64k", "--rope", "default")
    assert "one of linear, ntk, dynamic, yarn, llama3, none" in wrong


def test_tuning_options_need_steps() -> None:
    assert "--tune-steps" in refuse("compare", "--tune-rows", "3")
    assert "--tune-steps" in refuse("compare", "--tune-rate", "0.1")


def test_errors_name_what_the_command_knows(document: Path) -> None:
    assert "float64, auto" in refuse("generate", "tiny", "--file", document, "--dtype", "foo")
    assert "random-llama, random-llama-8b" in refuse("bench", "prefill", "random-foo")
    for options in (["report", "tiny", "--file", document], ["eval", "tiny"]):
        assert "--questions" in refuse(*options, "--tasks", "qa")
    least = refuse("bench", "recall", "--length", "100")
    assert "at least 1,072" in least and "--length 1072" in least


def test_a_demo_too_short_to_leave_anything_out_says_so(tmp_path: Path) -> None:
    told = run("demo", "--length", "100", "--documents", "1", "--output", tmp_path)
    assert told.exit_code == 0 and "MS-SWIFT was exact here" in told.output
