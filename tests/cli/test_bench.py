"""``longswift bench``: every command at small sizes, and regressions as exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longswift.eval.results import Result
from tests.cli.test_cli import refuse, run

SMALL = ["--mechanism", "sliding_window", "--set", "sliding_window.window=16", "--repeats", "1"]


def save(place: Path, seconds: float, kind: str = "attention") -> Path:
    row = {"name": "sdpa", "length": 8, "seconds": seconds}
    return Result(kind=kind, config={}, seed=0, rows=[row]).save(place)


def test_all_is_every_mechanism_and_memory(tmp_path: Path) -> None:
    from longswift.mechanisms import list_mechanisms
    from longswift.memory import list_memories

    data, picture = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--mechanism", "all", "--lengths", "64,128", "--repeats", "1", "--no-memory"]
    result = run("bench", "attention", *options, "--json", data, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "nystrom (bidirectional)" in result.output and "Ceilings" in result.output
    found = {row["name"] for row in json.loads(data.read_text())["rows"]}
    assert found == {*list_mechanisms(), *list_memories(), "sdpa", "sdpa (bidirectional)"}
    assert "growth with the number of tokens" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command",
    [
        ["decode", "--lengths", "64", "--batches", "1,2", "--tokens", "2", "--dynamic-cache"],
        ["prefill", "random-llama", "--lengths", "64,96", "--chunk", "32", "--no-memory"],
        ["train", "--lengths", "64", "--checkpointing", "--no-memory"],
    ],
    ids=lambda command: command[0],
)
def test_phases_write_json_and_a_picture(command: list[str], tmp_path: Path) -> None:
    data, picture = tmp_path / "r.json", tmp_path / "r.png"
    result = run("bench", *command, *SMALL, "--json", data, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "than SDPA" in result.output and "whole model" in result.output
    content = json.loads(data.read_text())
    assert content["kind"] == command[0] and content["environment"]["versions"]["torch"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_ones_own(model_directory: Path) -> None:
    result = run("bench", "prefill", model_directory, "--lengths", "64", "--no-memory", *SMALL)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["attention", "--against", "flash"], "sdpa, flex"),
        (["decode", "--against", "flash"], "sdpa, flex"),
        (["decode", "--batches", "many"], "'many'"),
        (["decode", "./none"], "no such directory"),
        (["decode", "--mechanism", "nystrom"], "causal"),
        (["decode", "--budget", "-1"], "seconds above 0"),
        (["attention", "--budget", "0"], "seconds above 0"),
        (["attention", "--heads", "0"], "whole number of at least 1"),
        (["prefill"], "MODEL"),
        (["prefill", "random-llama", "--chunk", "100"], "block"),
        (["train", "--dtype", "int8"], "int8"),
        (["train", "--plot", "/proc/nowhere/r.png"], "/proc/nowhere"),
        (["train", "--plot", "r.txt"], ".png or .svg"),
        (["attention", "--plot", "r"], ".png or .svg"),
        (["attention", "--mechanism", "all", "--set", "nothing.x=1"], "--set"),
    ],
)
def test_refusals_are_one_line(command: list[str], why: str) -> None:
    assert why.lower() in refuse("bench", *command).lower()


def test_diff_fails_on_a_regression_only(tmp_path: Path) -> None:
    before, after = save(tmp_path / "a.json", 1.0), save(tmp_path / "b.json", 1.3)
    worse = run("bench", "diff", before, after)
    assert worse.exit_code == 1 and "1.30x" in worse.output and "worse" in worse.output
    assert run("bench", "diff", before, after, "--tolerance", "0.5").exit_code == 0
    assert run("bench", "diff", after, before).exit_code == 0
    assert "none.json" in refuse("bench", "diff", before, tmp_path / "none.json")
    other = save(tmp_path / "c.json", 1.0, kind="decode")
    assert "one kind" in refuse("bench", "diff", before, other)
    assert "--tolerance" in refuse("bench", "diff", before, after, "--tolerance", "-1")


def test_diff_says_what_was_different(tmp_path: Path) -> None:
    row = {"name": "sdpa", "length": 8, "seconds": 1.0}
    for name, config in (("a", {"dtype": "float32"}), ("b", {"dtype": "bfloat16"})):
        file = tmp_path / f"{name}.json"
        Result(kind="attention", config=config, seed=0, rows=[row]).save(file)
    result = run("bench", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 0 and "options differ in dtype" in result.output


@pytest.mark.parametrize("figure", ["1.0", float("nan"), -1.0, 0.0, None, True])
def test_diff_refuses_figures_that_are_none(tmp_path: Path, figure: object) -> None:
    good, bad = save(tmp_path / "a.json", 1.0), save(tmp_path / "b.json", 1.0)
    content = json.loads(bad.read_text())
    content["rows"][0]["seconds"] = figure
    bad.write_text(json.dumps(content))
    for pair in ((good, bad), (bad, good)):
        said = refuse("bench", "diff", *pair)
        assert "b.json" in said and "rows[0] (sdpa 8)" in said and "'seconds'" in said


def test_diff_tells_what_only_one_result_holds(tmp_path: Path) -> None:
    old, new = save(tmp_path / "a.json", 1.0), save(tmp_path / "b.json", 1.0)
    content = json.loads(new.read_text())
    content["rows"][0]["extra_bytes"] = None
    new.write_text(json.dumps(content))
    assert "note: " not in run("bench", "diff", old, new).output
    content["rows"].append({"name": "full", "length": 8, "seconds": 1.0})
    new.write_text(json.dumps(content))
    told = run("bench", "diff", old, new)
    assert told.exit_code == 0 and f"note: seconds of full 8 is only in {new}" in told.output
