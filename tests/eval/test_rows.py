"""Rows that somebody edited: one line that names file and field, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from longswift.core.errors import InputError
from longswift.eval import demo, fidelity_runs, report
from longswift.eval.rows import check_rows
from tests.eval.test_demo import asked as demo_asked
from tests.eval.test_fidelity import SMALL
from tests.eval.test_report import asked as report_asked


@dataclass(frozen=True, kw_only=True)
class Row:
    """Something of every type that rows have."""

    name: str
    seconds: float
    peak: int | None
    parts: list[float]
    windows: list[tuple[int, int]]
    note: str = ""


GOOD: dict[str, Any] = {
    "name": "a",
    "seconds": 1,
    "peak": None,
    "parts": [1.5],
    "windows": [[1, 2]],
}


def test_a_row_as_it_was_written_passes() -> None:
    check_rows([GOOD, {**GOOD, "peak": 3, "note": "x"}], Row, Path("r.json"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": None}, "expected text in rows[0].name, got None"),
        ({"seconds": "1"}, "a finite number in rows[0].seconds, got '1'"),
        ({"seconds": float("nan")}, "rows[0].seconds, got nan"),
        ({"seconds": True}, "rows[0].seconds, got True"),
        ({"peak": 1.5}, "a whole number in rows[0].peak"),
        ({"parts": 3}, "a list in rows[0].parts"),
        ({"parts": [1.0, None]}, "rows[0].parts[1]"),
        ({"windows": [[1]]}, "2 values in rows[0].windows[0]"),
        ({"extra": 1}, "'extra'"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError) as refused:
        check_rows([{**GOOD, **change}], Row, Path("r.json"))
    said = str(refused.value)
    assert why in said and said.startswith("r.json: ") and "--fresh" in said


def test_a_missing_field_and_an_unknown_kind_are_named() -> None:
    short = {key: value for key, value in GOOD.items() if key != "parts"}
    with pytest.raises(InputError, match="'parts'"):
        check_rows([short], Row, Path("r.json"))
    with pytest.raises(InputError, match=r"one of a, b in rows\[0\].name, got 'c'"):
        check_rows([{**GOOD, "name": "c"}], ("name", {"a": Row, "b": Row}), Path("r.json"))


def refuses(file: Path, again: Callable[[], object], *path: Any) -> None:
    """Reuse works; without the field at ``path``, or with text in its place, it is refused."""
    again()
    written = file.read_text()
    for spoil in ("missing", "text"):
        content = json.loads(written)
        place = content["rows"]
        for key in path[:-1]:
            place = place[key]
        if spoil == "missing":
            del place[path[-1]]
        else:
            place[path[-1]] = {"no": "figure"}
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{path[-1]}.*--fresh") as refused:
            again()
        assert file.name in str(refused.value)
    file.write_text(written)


def test_demo(model_directory: Path, tmp_path: Path) -> None:
    def again() -> object:
        return demo.run(demo_asked(model_directory), tmp_path, progress=False)

    again()
    refuses(tmp_path / "demo.json", again, 1, "perplexity")


def test_fidelity(model_directory: Path, tmp_path: Path) -> None:
    asked = fidelity_runs.FidelityRun(
        mechanism=SMALL.to_dict(), model=str(model_directory), length=256, chunk=64
    )
    file = tmp_path / "f.json"

    def again() -> object:
        return fidelity_runs.run(asked, file, progress=False)

    again()
    parts = [row["part"] for row in json.loads(file.read_text())["rows"]]
    refuses(file, again, parts.index("end"), "nll")
    refuses(file, again, parts.index("head"), "error")
    refuses(file, again, 0, "part")


def test_report(model_directory: Path, tmp_path: Path) -> None:
    from longswift.tiny import corpus

    text = tmp_path / "text.txt"
    text.write_text(corpus.text("heldout")[:20_000], encoding="utf-8")
    asked = report_asked(model_directory, text, fidelity=True, tasks="needle", samples=1)
    page = tmp_path / "r.html"

    def again() -> object:
        return report.run(asked, page, progress=False)

    again()
    sections = [row["section"] for row in json.loads(page.with_suffix(".json").read_text())["rows"]]
    data = page.with_suffix(".json")
    refuses(data, again, 0, "nll")
    judged, asked_for = sections.index("fidelity"), sections.index("retrieval")
    refuses(data, again, judged, "content", "heads", 0, "captured_mean")
    refuses(data, again, asked_for, "content", "rows", 0, "score")
    refuses(data, again, asked_for, "section")
