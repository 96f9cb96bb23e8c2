"""Results: what is written comes back, nothing half-written stays, nonsense is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longswift.core.errors import InputError
from longswift.core.files import replace
from longswift.eval.results import Progress, Result, load, writable


def result(**changes: object) -> Result:
    content = {"kind": "attention", "config": {"lengths": [1, 2]}, "seed": 3, "rows": [{"a": 1}]}
    return Result(**{**content, **changes})  # type: ignore[arg-type]


def test_a_saved_result_comes_back_equal(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "r.json"
    written = result(summary={"x": None})
    written.save(file)
    assert load(file, "attention") == written
    assert written.environment.versions["torch"]
    assert [p.name for p in file.parent.iterdir()] == ["r.json"]


def test_the_environment_names_no_place() -> None:
    text = json.dumps(result().environment.to_dict())
    assert str(Path.home()) not in text and str(Path(__file__).parents[2]) not in text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("[]", "Result"),
        ("{}", "fields"),
        ('{"schema": 99}', "schema 99"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(InputError, match=why):
        load(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "three"), ("rows", {}), ("rows", [1]), ("extra", 1), ("environment", 3)],
)
def test_wrong_types_are_refused(tmp_path: Path, field: str, value: object) -> None:
    file = tmp_path / "r.json"
    content = {**result().to_dict(), field: value}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError):
        load(file)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    result().save(tmp_path / "r.json")
    with pytest.raises(InputError, match="kind"):
        load(tmp_path / "r.json", "demo")


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        result(rows=[{"a": float("nan")}]).save(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"
    file.write_text("old")

    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(file, interrupted)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.txt"]


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        writable(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no named pipes there")
def test_devices_and_pipes_are_refused_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="device or a pipe"):
        writable(pipe)
    with pytest.raises(InputError, match="plain file"):
        result().save(pipe)
    assert pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe.json"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.txt", "A text of one's own."),
        ("mine.json", '{"my": "data"}'),
        ("mine.json", "[1, 2]"),
        ("mine.html", "<!doctype html><p>A page about longswift.</p>"),
        ("mine.samples.jsonl", '{"question": "a line"}'),
        ("mine.png", "no picture"),
    ],
)
def test_a_file_of_something_else_is_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InputError, match="something else"):
        writable(file)
    assert file.read_text() == content and [p.name for p in tmp_path.iterdir()] == [name]


def test_results_replace_results_of_their_kind_only(tmp_path: Path) -> None:
    file = result().save(tmp_path / "r.json")
    assert writable(file, kind=result().kind) == file and writable(file) == file
    with pytest.raises(InputError, match="of an earlier run"):
        writable(file, kind="demo")
    (tmp_path / "empty.json").touch()
    assert writable(tmp_path / "empty.json", kind="demo").is_file()


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    file, link = tmp_path / "far" / "r.json", tmp_path / "r.json"
    file.parent.mkdir()
    link.symlink_to(file)
    assert result().save(link) == link
    assert link.is_symlink() and load(file) == load(link)


def test_rows_of_the_same_run_are_reused_and_others_not(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    Progress(result(rows=[]), file).add({"a": 1}, {"a": 2})
    again = Progress(result(rows=[]), file)
    assert again.reused == 2 and again.find(a=2) == {"a": 2} and again.find(a=3) is None
    assert Progress(result(rows=[], seed=4), file).reused == 0
    assert Progress(result(rows=[]), file, fresh=True).reused == 0
    again.done()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "r.partial.json").write_text("{")
    assert Progress(result(rows=[]), tmp_path / "r.json").reused == 0
